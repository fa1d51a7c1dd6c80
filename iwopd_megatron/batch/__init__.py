"""What a round trains on: samples, packed micro-batches, and what each adds to the loss.

In come samples with their log-probs and scores; out go micro-batches balanced over data-
parallel ranks, their losses under global denominators, sums for metrics, and the gates that
refuse a round whose numbers are not true.
"""

__all__ = [
    "gates",
    "metrics",
    "minibatch",
    "objective",
    "packing",
    "routing",
    "scores",
    "trajectory",
]
