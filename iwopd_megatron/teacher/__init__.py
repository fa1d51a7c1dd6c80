"""Who scores the answers: teachers inside the trainer's processes, or behind HTTP.

In come samples; out goes what each teacher says of every token: log-probs, and its likeliest
tokens where the objective asks. `service` is `iwopd serve-teacher`, the server's side.
"""

__all__ = ["embedded", "service", "teachers"]
