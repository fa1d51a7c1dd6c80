"""Programs in answers: found in the response, run in a sandbox, compared with the problem's tests.

In come a response and the problem's tests; out goes a verdict. A program never runs in this
process.
"""

__all__ = ["cases", "grader", "sandbox"]
