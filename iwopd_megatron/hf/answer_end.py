"""Which ids end an answer, and whether tokenizer and chat template agree with the configs on them.

Engines stop at the ids of generation_config.json (or config.json). A model whose tokenizer and
template end answers with others never stops; one that is fine-tuned on others learns not to.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from iwopd_megatron.errors import RecipeError
from iwopd_megatron.hf.config import read_hf_config
from iwopd_megatron.hf.folder import eos_ids

PROBE = "the answer"


def end_id(folder: Path, tokenizer: Any) -> int:
    """Return the id that a given response is ended with: one that engines stop at.

    The chat template's end of a turn where it is one, or else the tokenizer's EOS.
    """
    ends = eos_ids(folder)
    wanted = [turn_end_id(tokenizer), tokenizer.eos_token_id]
    return next((token for token in wanted if token in ends), min(ends))


def response_ids(response: str, end: int, tokenizer: Any) -> list[int]:
    """Return the ids of a given response, with `end` at the end, once."""
    ids = tokenizer.encode(response, add_special_tokens=False)
    return ids if ids[-1:] == [end] else [*ids, end]


def all_end_ids(folder: Path, tokenizer: Any) -> set[int]:
    """Return every id of the model that ends an answer by configs, tokenizer or chat template."""
    said = {token for token in _said(tokenizer).values() if token < _vocabulary(folder)}
    return eos_ids(folder) | said


def turn_end_id(tokenizer: Any) -> int | None:
    """Return the id that the chat template ends an assistant's turn with; None without one."""
    if not tokenizer.chat_template:
        return None
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": PROBE}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception:  # a template's own code raises what it likes; prompts tell if it matters
        return None
    rest = text.rpartition(PROBE)[2]
    special = {str(token): i for i, token in tokenizer.added_tokens_decoder.items()}
    found = [token for token in special if token in rest]
    return special[min(found, key=rest.index)] if found else None


def check_answer_end(folder: Path, tokenizer: Any, is_taught: bool = False) -> list[str]:
    """Compare what tokenizer and template end answers with to what engines stop at; return notes.

    RecipeError if nothing agrees, unless the model `is_taught` its end (`end_id`) first.
    """
    ends, said = eos_ids(folder), _said(tokenizer)
    for what, token in said.items():
        check_ids([token], _vocabulary(folder), f"{folder}: {what}", tokenizer)
    others = {what: token for what, token in said.items() if token not in ends}
    if not others:
        return []
    words = " and ".join(
        f"{what} is {tokenizer.convert_ids_to_tokens(token)!r} ({token})"
        for what, token in others.items()
    )
    sentence = (
        f"{words} in {folder}, but engines end answers at {sorted(ends)}, as its configs say; "
        f"write eos_token_id: {sorted(ends | set(others.values()))} in its generation_config.json"
    )
    if len(others) == len(said) and not is_taught:
        raise RecipeError(f"{sentence}.")
    if is_taught:
        return [
            f"{sentence} for other programs; answers are ended with {end_id(folder, tokenizer)}"
        ]
    return [f"{sentence} if answers may end so."]


def _vocabulary(folder: Path) -> int:
    return read_hf_config(folder).vocab_size


def check_ids(ids: list[int], vocabulary: int, where: str, tokenizer: Any) -> None:
    """Refuse ids not below the model's vocabulary size; RecipeError names their text `where`."""
    if ids and max(ids) >= vocabulary:
        token = max(ids)
        raise RecipeError(
            f"{where}: the tokenizer gives {tokenizer.convert_ids_to_tokens(token)!r} the id "
            f"{token}, and the model's vocab_size is {vocabulary}; give the folder the tokenizer "
            "that belongs to the model, or take that text out."
        )


def _said(tokenizer: Any) -> dict[str, int]:
    """Return the ids that end an answer by the tokenizer's files, by what says so."""
    found = {
        "the tokenizer's eos_token": tokenizer.eos_token_id,
        "the chat template's end of a turn": turn_end_id(tokenizer),
    }
    return {what: token for what, token in found.items() if token is not None}
