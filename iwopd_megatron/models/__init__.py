"""Megatron-Core models: built from a Hugging Face configuration, run and optimised.

In come an `HfConfig` and a layout; out go this rank's model chunks, their optimiser, and log-
probs of micro-batches, to train on or to score.
"""

__all__ = ["actor", "gpt", "native_ops", "optimizer", "passed_on", "rotary", "router_load"]
