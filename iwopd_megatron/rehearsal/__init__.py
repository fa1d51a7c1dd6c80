"""The whole run at its real size on a machine without a GPU: shapes, slices, bytes, collectives.

In comes a recipe; out goes what would be wrong on the cluster, with figures beside the plan's. The
code that is rehearsed is the run's own: its models, loading, schedules, optimiser, weight stream
and checkpoints, on tensors without memory (memoryless.py), as one rank of a world in which nobody
answers (world.py).
"""

__all__ = ["full", "table"]
