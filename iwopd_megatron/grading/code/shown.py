"""Values in messages: short, on one line."""

from __future__ import annotations

from typing import Any

MOST = 120  # characters


def shown(value: Any) -> str:
    """Return how Python writes a value, its middle left out if that is longer than MOST."""
    text = repr(value)
    half = MOST // 2 - 3
    return text if len(text) <= MOST else f"{text[:half]} ... {text[-half:]}"
