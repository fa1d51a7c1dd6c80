"""Prompts as token ids: the one place where messages meet a chat template.

Everything that asks a model - training, evaluation, benchmarks, prefixes - asks through `Prompts`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from iwopd_megatron.data.conversation import Message
from iwopd_megatron.data.problems import Problem
from iwopd_megatron.errors import RecipeError
from iwopd_megatron.hf.answer_end import check_ids
from iwopd_megatron.hf.config import read_hf_config

if TYPE_CHECKING:
    from iwopd_megatron.config.recipe import Recipe


def load_tokenizer(folder: Path) -> Any:
    """Return the tokenizer of a Hugging Face folder; RecipeError if it cannot be loaded."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # the library raises a type of its own for each damaged file
        words = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise RecipeError(
            f"the tokenizer of {folder} cannot be loaded ({words}); copy the model's original "
            "tokenizer files there."
        ) from None


def training_prompts(recipe: Recipe, tokenizer: Any) -> Prompts:
    """Return how a recipe asks the problems that it trains on."""
    return Prompts(
        tokenizer, recipe.data.enable_thinking, "data.enable_thinking", _vocabulary(recipe)
    )


def evaluation_prompts(recipe: Recipe, tokenizer: Any) -> Prompts:
    """Return how a recipe asks held-out problems."""
    section = "data" if recipe.evaluate.enable_thinking is None else "evaluate"
    return Prompts(
        tokenizer, recipe.thinks_in_evaluation, f"{section}.enable_thinking", _vocabulary(recipe)
    )


def _vocabulary(recipe: Recipe) -> int:
    return read_hf_config(recipe.student.hf).vocab_size


class Prompts:
    """How a model is asked problems: through its chat template, plain where it has none."""

    def __init__(
        self,
        tokenizer: Any,
        enable_thinking: bool = False,
        setting: str = "",
        vocabulary: int | None = None,
    ):
        """Take a tokenizer; RecipeError if its template ignores an enabled thinking.

        setting: the recipe's key that enables thinking, for that sentence. vocabulary: the model's
        size; a prompt with a larger id is refused.
        """
        self.tokenizer, self.enable_thinking = tokenizer, enable_thinking
        self.vocabulary = vocabulary
        self.folder = getattr(tokenizer, "name_or_path", "")
        self._seen: dict[tuple[str, ...], int | None] = {}  # by roles, what a template leaves out
        if enable_thinking and not self._reads_thinking():
            raise RecipeError(
                f"{setting}=true does nothing: the chat template of {self.folder} does not read "
                "enable_thinking; leave it out."
            )

    def encode(self, problem: Problem) -> list[int]:
        """Return a prompt's token ids, up to where the answer begins; RecipeError names the row."""
        messages = problem.messages
        if self.tokenizer.chat_template:
            text = self._rendered(messages, problem.place)
        elif len(messages) == 1:
            text = messages[0]["content"]
        else:
            raise RecipeError(
                f"{problem.place} has {len(messages)} messages, but the tokenizer of {self.folder} "
                "has no chat template to write them with; give it one, or write the row as one "
                "question."
            )
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        if self.vocabulary is not None:
            check_ids(ids, self.vocabulary, problem.place, self.tokenizer)
        return ids

    def _rendered(self, messages: list[Message], place: str) -> str:
        roles = tuple(message["role"] for message in messages)
        left_out = self._left_out(roles, place)
        if left_out is not None:
            raise RecipeError(
                f"{place}: the chat template of {self.folder} leaves out message {left_out + 1}, "
                f"of role {roles[left_out]}; take it out of the row, or change the template."
            )
        return self._apply(messages, self.enable_thinking, place)

    def _left_out(self, roles: tuple[str, ...], place: str) -> int | None:
        """Return the first message that the template leaves out of messages of these roles."""
        if roles not in self._seen:
            texts = [f"text {number} of {len(roles)}" for number in range(len(roles))]
            probe = [{"role": r, "content": c} for r, c in zip(roles, texts, strict=True)]
            written = self._apply(probe, self.enable_thinking, place)
            missing = (number for number, text in enumerate(texts) if text not in written)
            self._seen[roles] = next(missing, None)
        return self._seen[roles]

    def _apply(self, messages: list[Message], enable_thinking: bool, place: str) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=True,
                enable_thinking=enable_thinking,
            )
        except Exception as error:  # whatever the template's own code raises
            words = " ".join(str(error).split())[:200].rstrip(".")
            raise RecipeError(
                f"{place}: the chat template of {self.folder} refuses these messages ({words})."
            ) from None

    def _reads_thinking(self) -> bool:
        """Return whether a prompt with thinking differs from one without."""
        if not self.tokenizer.chat_template:
            return False
        probe = [{"role": "user", "content": "?"}]
        on, off = (self._apply(probe, value, "the question '?'") for value in (True, False))
        return on != off
