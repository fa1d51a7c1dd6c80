"""Who writes the answers: one protocol, `RolloutEngine`, and the engines behind it.

In come prompts, sampling settings and new weights; out go samples with the log-probs under
which they were drawn, and a proof that the new weights landed.
"""

__all__ = ["broadcast", "engine", "make", "servers"]
