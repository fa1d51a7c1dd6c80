"""Typed values out of a JSON object that people bring, or one sentence about the first wrong one.

Types are as strict as transformers' own: a count is a JSON integer, not "64" or 64.0.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from iwopd_megatron.errors import RecipeError

_REQUIRED = object()


class TypedJson:
    """A JSON object and the file (or part of it) that error sentences name."""

    def __init__(self, content: dict[str, Any], file: Path | str):
        """Take an object; `file` is how sentences name it."""
        self.content, self.file = content, file

    def _get(self, key: str, default: Any) -> Any:
        if key not in self.content and default is _REQUIRED:
            raise RecipeError(f"{self.file} lacks '{key}'; copy the model's original config.json.")
        return self.content.get(key, default)

    def _refuse(self, key: str, wanted: str) -> RecipeError:
        return RecipeError(f"{self.file}: {key}={self.content.get(key)!r} must be {wanted}.")

    def count(self, key: str, default: Any = _REQUIRED) -> int:
        """Return the whole number above 0 at a key; RecipeError for anything else."""
        value = self._get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self._refuse(key, "a whole number above 0")
        return value

    def number(self, key: str, default: Any = _REQUIRED) -> float:
        """Return the finite number above 0 at a key; RecipeError for anything else."""
        value = self._get(key, default)
        if not _is_number(value) or value <= 0:
            raise self._refuse(key, "a number above 0")
        return float(value)

    def flag(self, key: str, default: Any = _REQUIRED) -> bool:
        """Return the true or false at a key; RecipeError for anything else."""
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self._refuse(key, "true or false")
        return value

    def ids(self, key: str) -> tuple[int, ...]:
        """Return the token ids at a key, one or a list; none where it is missing or null."""
        value = self.content.get(key)
        found = [] if value is None else value if isinstance(value, list) else [value]
        if any(not isinstance(i, int) or isinstance(i, bool) or i < 0 for i in found):
            raise self._refuse(key, "a token id or a list of token ids")
        return tuple(found)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
