"""Programs in answers: found in the response and run in a sandbox on the problem's test cases.

In come a response and the problem's test cases; out goes a verdict. A program never runs in this
process.
"""

__all__ = ["cases", "grader", "sandbox"]
