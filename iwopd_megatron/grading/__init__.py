"""Grading: graders of mathematics and programs, in processes that may hang or crash.

In comes a `Submission`, a response and its problem's reference answer; out goes a `Grade`: 1.0 or
0.0, and what kept the grader from finding out.
"""

__all__ = ["graders", "pool"]
