"""Is an answer right? Graders of mathematics and programs, in processes that may hang or crash.

In come a response and its problem's reference answer; out goes a `Grade`, right or wrong and
why.
"""

__all__ = ["graders", "pool"]
