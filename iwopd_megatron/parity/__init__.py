"""Proof that two things compute the same: a Megatron layout and Hugging Face, or two folders.

In come a model folder and a layout; out go the largest errors of logits and of every
parameter's gradient over all ranks, and what of a recipe cannot run.
"""

__all__ = ["check", "hf_reference", "parity", "rehearse"]
