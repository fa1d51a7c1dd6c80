"""The recipe's data section: where problems come from, and which are left out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from iwopd_megatron.config.models import Section


class Source(Section):
    """One set of problems. A known `name` fills in every key that is not given."""

    name: str | None = Field(
        None, description="deepmath, eurus_code, or a dataset's name on the Hugging Face hub"
    )
    path: Path | None = Field(
        None, description="instead of the hub: .jsonl, .parquet, or a folder of either"
    )
    split: str = Field("train", description="of a dataset from the hub")
    columns: dict[str, str] = Field(
        {},
        description="where question, answer, difficulty, source and response are if not under "
        "their own names; dots reach inside, e.g. answer: reward_model.ground_truth; a question "
        "is a text or a list of messages",
    )
    where: dict[str, Any] = Field({}, description="only rows with these values, e.g. ability: code")
    source: str | None = Field(
        None, description="kind of problem, which chooses the teacher; default: the source column"
    )
    grader: str | None = Field(None, description="math, code, ...; default: the problem's source")
    min_difficulty: float | None = Field(None, description="easier problems are left out")
    prefix: str = Field("", description="goes before every question, the user's last message")
    suffix: str = Field("", description="goes after it")
    share: float | None = Field(
        None,
        gt=0,
        description="weight of this source in the mix, to 1 %; default: as many as there are",
    )

    @model_validator(mode="after")
    def _has_place(self) -> Source:
        if self.name is None and self.path is None:
            raise ValueError("a source needs a path, or the name of a dataset")
        return self

    @property
    def title(self) -> str:
        """How sentences name it: its dataset's name, or its path."""
        return str(self.name or self.path)


def _as_list(value: Any) -> Any:
    """Return a path alone as a list of one source, anything else as it is."""
    return [{"path": value}] if isinstance(value, (str, Path)) else value


class Data(Section):
    """The problems of a run, and how they are asked."""

    train: Annotated[list[Source], BeforeValidator(_as_list)] = Field(
        min_length=1,
        description="JSONL with question, answer, difficulty, source (and response for sft), "
        "or a list of sources",
    )
    eval: Path | None = Field(None, description="JSONL of held-out problems")
    enable_thinking: bool = Field(
        False,
        description="passed to the chat template of every prompt; off, as in the paper, Qwen3's "
        "opens and closes the thinking part itself",
    )
    shuffle: bool = Field(True, description="a new order every epoch; false: the order of the file")
    held_out: list[str] = Field(
        [],
        description="files and benchmarks, besides data.eval, that training should not have seen",
    )
    remove_duplicates: bool = Field(False, description="keep a question's first appearance only")
    remove_contaminated: bool = Field(
        False, description="leave out questions that share 13 words in a row with a held-out one"
    )
    benchmarks: dict[str, Source] = Field(
        {}, description="more benchmarks by name, or where a known one lies on this machine"
    )

    @model_validator(mode="after")
    def _all_or_none(self) -> Data:
        if len({source.share is None for source in self.train}) > 1:
            raise ValueError("give every source of train a share, or none")
        return self
