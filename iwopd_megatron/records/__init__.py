"""A run's folder beside its checkpoints: what is written there, and whether a run may go on there.

In come a round's metrics, events and samples; out go lines, TensorBoard and W&B records, and one
sentence where the disk is full or the folder may not be used. `words` writes figures for people.
"""

__all__ = ["disk", "recorder", "resume", "runlog", "samples", "wandb_log", "words"]
