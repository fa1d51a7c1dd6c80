"""Megatron `torch_dist` checkpoints, written and read without a model or a process group.

In come tensors by Megatron's names, in chunks, or a checkpoint of any layout; out go files that
Megatron loads, or any rows of a tensor. A chunk at a time, in memory that does not grow.
"""

__all__ = ["blob", "objects", "reader", "writer"]
