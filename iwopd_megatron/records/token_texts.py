"""What each token of a response adds to its text, for a reader."""

from __future__ import annotations

from os.path import commonprefix
from typing import Any

PART = "\N{REPLACEMENT CHARACTER}"  # bytes that are no character yet, as tokenizers write them
BEFORE = 3  # tokens that may hold a character's earlier bytes: it has at most four


def token_texts(tokenizer: Any, ids: list[int]) -> list[str]:
    """Return the text of each of a response's ids; no text is empty.

    A character of several tokens stands at the last of them, PART at those before. An id of the
    model that the tokenizer lacks reads `<id 151935>`.
    """
    return [_added(tokenizer, ids, end) for end in range(1, len(ids) + 1)]


def _added(tokenizer: Any, ids: list[int], end: int) -> str:
    """Return what the last of the first `end` ids adds to the text of those before it."""
    start, token = max(0, end - 1 - BEFORE), ids[end - 1]
    texts = [tokenizer.decode(ids[start:last]) for last in (end - 1, end)]
    added = texts[1][len(commonprefix(texts)) :]  # a part that the token completes is not common
    own = tokenizer.decode([token])
    return added or own or tokenizer.convert_ids_to_tokens(token) or f"<id {token}>"
