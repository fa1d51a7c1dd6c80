"""What a run writes down beside its checkpoints, and the words that people read.

In come a round's metrics, events and samples; out go lines, TensorBoard and W&B records, and
whether a run folder may be started in or gone on with.
"""

__all__ = ["disk", "recorder", "resume", "runlog", "samples", "wandb_log", "words"]
