"""Problems, and an order of them that is a function of seed and cursor."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Protocol

from iwopd_megatron.data.conversation import Message


@dataclass(frozen=True)
class Problem:
    """One row of a data set; `response` only where it has one, to fine-tune a model on."""

    question: str  # what the user says, of a row of messages what the user says last
    answer: str
    difficulty: float
    source: str  # its kind: chooses the teacher, and the grader unless `own_grader` does
    response: str | None = None
    own_grader: str | None = None
    prefix: str = ""
    suffix: str = ""
    before: tuple[Message, ...] = ()  # a system prompt, earlier turns
    after: tuple[Message, ...] = ()  # a call of a tool and its result
    place: str = field(default="", compare=False)  # its file and line
    is_answered: bool = field(default=False, compare=False)  # its messages ended with the response

    @property
    def messages(self) -> list[Message]:
        """The messages that a model is asked, prefix and suffix included, without the response."""
        asked = {"role": "user", "content": self.prefix + self.question + self.suffix}
        return [*self.before, asked, *self.after]

    @property
    def prompt(self) -> str:
        """The messages as one text for a reader."""
        messages = self.messages
        if len(messages) == 1:
            return messages[0]["content"]
        return "\n\n".join(f"{m['role']}: {m['content']}" for m in messages)

    @property
    def texts(self) -> list[tuple[str, str]]:
        """Role and text of every message, without prefix and suffix."""
        asked = {"role": "user", "content": self.question}
        return [(m["role"], m["content"]) for m in (*self.before, asked, *self.after)]

    @property
    def target(self) -> str:
        """The response that a model is fine-tuned on; ValueError where the row has none."""
        if self.response is None:
            raise ValueError(f"{self.place or 'a problem'} has no response to fine-tune on")
        return self.response

    @property
    def grader(self) -> str:
        """The name of its grader: its own, or its source."""
        return self.own_grader or self.source


class Order(Protocol):
    """An endless order of problem indices; `cursor` is all its state."""

    cursor: int

    def take(self, number: int) -> list[int]:
        """Return the next `number` problem indices, and move the cursor past them."""
        ...


class PromptOrder:
    """The order of one source: every epoch permuted anew, or in file order."""

    def __init__(self, count: int, seed: int | str, shuffle: bool = True):
        """Start at the first of `count` problems."""
        self.count, self.seed, self.shuffle = count, seed, shuffle
        self.cursor = 0
        self._epoch: tuple[int, list[int]] = (-1, [])

    def take(self, number: int) -> list[int]:
        """Return the next `number` problem indices, and move the cursor past them."""
        taken = [self.at(self.cursor + i) for i in range(number)]
        self.cursor += number
        return taken

    def at(self, position: int) -> int:
        """Return the index at a place of the endless order."""
        epoch, place = divmod(position, self.count)
        if self._epoch[0] != epoch:
            order = list(range(self.count))
            if self.shuffle:
                random.Random(f"{self.seed}-{epoch}").shuffle(order)
            self._epoch = (epoch, order)
        return self._epoch[1][place]


class MixedOrder:
    """The order of several sources: every BLOCK prompts hold each one's share exactly, shuffled.

    Sources lie behind one another in the list of problems. Each goes through epochs of its own.
    """

    BLOCK = 100

    def __init__(self, counts: list[int], shares: list[float], seed: int, shuffle: bool = True):
        """Start at the first problem; `counts` and `shares` of each source, shares to 1 %."""
        self.orders = [
            PromptOrder(count, f"{seed}-source-{i}", shuffle) for i, count in enumerate(counts)
        ]
        self.firsts = [sum(counts[:i]) for i in range(len(counts))]
        self.quotas = _round_to(self.BLOCK, shares)
        self.seed = seed
        self.cursor = 0
        self._block: tuple[int, list[tuple[int, int]]] = (-1, [])

    def take(self, number: int) -> list[int]:
        """Return the next `number` problem indices, and move the cursor past them."""
        taken = [self._at(self.cursor + i) for i in range(number)]
        self.cursor += number
        return taken

    def _at(self, position: int) -> int:
        block, place = divmod(position, self.BLOCK)
        if self._block[0] != block:
            sources = [source for source, quota in enumerate(self.quotas) for _ in range(quota)]
            random.Random(f"{self.seed}-block-{block}").shuffle(sources)
            seen = [block * quota for quota in self.quotas]
            pairs = []
            for source in sources:
                pairs.append((source, seen[source]))
                seen[source] += 1
            self._block = (block, pairs)
        source, nth = self._block[1][place]
        return self.firsts[source] + self.orders[source].at(nth)


def _round_to(total: int, shares: list[float]) -> list[int]:
    """Return whole numbers that sum to `total`, in proportion to shares, by largest remainders."""
    exact = [total * share / sum(shares) for share in shares]
    out = [int(x) for x in exact]
    by_remainder = sorted(range(len(shares)), key=lambda i: out[i] - exact[i])
    for i in by_remainder[: total - sum(out)]:
        out[i] += 1
    return out
