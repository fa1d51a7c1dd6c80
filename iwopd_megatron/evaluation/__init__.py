"""Scores of a model's answers on held-out problems: while it trains, after it, and from prefixes.

In come a rollout engine and a benchmark's problems; out go answers on disk, grades, accuracies
and pass@k with their standard errors.
"""

__all__ = [
    "answering",
    "continuations",
    "evaluate",
    "prefix_study",
    "progress",
    "run_benchmarks",
    "target",
]
