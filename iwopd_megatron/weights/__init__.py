"""Weights between Hugging Face names and Megatron shards: one table, read in both directions.

In come safetensors folders, `torch_dist` checkpoints or a living model; out go slices for any
layout, complete folders, checkpoints, and the stream of new weights for rollout engines.
"""

__all__ = [
    "convert",
    "hf_reader",
    "hf_writer",
    "manifest",
    "prune",
    "sync",
    "table",
    "transformers_views",
]
