"""What a recipe needs and costs, from the recipe and config.json alone.

In come a recipe, sizes of its models and a GPU's figures; out goes a `Plan`: memory of every
role, a round's timeline, cost, and other layouts, best first. Nothing here imports torch.

Formulas: activations.py and memory.py (bytes), time.py (seconds of a step), generation.py and
phases.py (seconds of a round), hardware.py (what GPUs and software reach).
"""

__all__ = [
    "hardware",
    "host_check",
    "memory",
    "model_size",
    "phases",
    "picture",
    "plan",
    "search",
    "setup",
    "text",
    "time",
    "traffic",
]
