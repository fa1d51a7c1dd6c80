"""The recipe: YAML and overrides, read into frozen pydantic models and checked.

In come a file and dotted overrides; out goes a `Recipe`, or one sentence (RecipeError) that
says what is wrong, where, and what to write instead. Nothing here imports torch.
"""

__all__ = [
    "cluster",
    "data",
    "doctor",
    "load",
    "loss",
    "models",
    "preflight",
    "recipe",
    "stages",
    "starter",
]
