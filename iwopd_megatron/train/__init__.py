"""The loop: collect answers, have them scored, check, step, publish weights, checkpoint.

In comes a recipe with its data; out goes a run folder from which the run can go on after any
kill.
"""

__all__ = ["checkpoint", "compare", "progress", "student", "trainer"]
