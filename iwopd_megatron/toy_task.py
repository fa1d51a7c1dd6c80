"""A verifiable task whose errors compound: sort letters by writing every step of a selection sort.

Question `ehacgbd=`; the response names the smallest letter left and then the letters that remain, until none
do: `aehcgbd` `behcgd` ... Its answer is the sorted letters. A sloppy writer picks a wrong letter, or drops or
doubles one while copying (which shifts every later position), more often early on; after a first slip it is
lost and slips at random. Same JSONL schema as the real sets, plus `response` where a model is fine-tuned.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

SOURCE = "selection_sort"
ALPHABET = "abcdefghijkl"
LETTERS = 7  # letters to sort
SLIP = 0.2  # chance of a slip in the sloppy writer's first step
LOST = 0.5  # chance of a slip in each step after the first slip
PAD, EOS = "<pad>", "<eos>"
SYMBOLS = (
    [PAD, EOS, "="]
    + list("abcdefghijklmnopqrstuvwxyz")
    + list("0123456789")
    + [".", ":", ",", "+", "-", "*", "/", "|", " "]
)


def write_trace(letters: list[str], rng: random.Random, slip: float = 0.0) -> str:
    """The response to a list of letters; with `slip` > 0, the sloppy writer's."""
    rest, trace, lost = list(letters), "", False
    for _ in letters:
        if not rest:
            break
        chance = LOST if lost and slip else slip * ((len(rest) - 1) / (len(letters) - 1)) ** 2
        wrong_pick = rng.random() < chance and len(rest) > 1
        wrong_copy = rng.random() < chance and len(rest) > 1
        pick = min(rest)
        if wrong_pick:
            pick = rng.choice([x for x in rest if x != pick] or [pick])
        rest.remove(pick)
        if wrong_copy and rest:
            place = rng.randrange(len(rest))
            if rng.random() < 0.5:
                rest.pop(place)
            else:
                rest.insert(place, rng.choice(ALPHABET))
        lost = lost or wrong_pick or wrong_copy
        trace += pick + "".join(rest)
    return trace


def make_problem(
    rng: random.Random, slip: float = 0.0, with_response: bool = False
) -> dict[str, Any]:
    """One line of a data file."""
    letters = rng.sample(ALPHABET, LETTERS)
    problem = {
        "question": "".join(letters) + "=",
        "answer": "".join(sorted(letters)),
        "difficulty": LETTERS,
        "source": SOURCE,
    }
    return problem | ({"response": write_trace(letters, rng, slip)} if with_response else {})


def is_right(response: str, answer: str) -> bool:
    """Whether the picks, at the places where a right trace has them, are the sorted letters."""
    total = len(answer)
    picks = [sum(range(total, total - i, -1)) for i in range(total)]
    return (
        len(response) == total * (total + 1) // 2 and "".join(response[i] for i in picks) == answer
    )


def write_jsonl(
    path: Path, count: int, seed: int, slip: float = 0.0, with_response: bool = False
) -> None:
    """`count` problems, a function of the seed."""
    rng = random.Random(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(make_problem(rng, slip, with_response)) for _ in range(count))
    path.write_text("\n".join(lines) + "\n")


def write_tokenizer(folder: Path) -> None:
    """A character-level tokenizer as a normal Hugging Face tokenizer folder."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(
        models.WordLevel({symbol: i for i, symbol in enumerate(SYMBOLS)}, unk_token=PAD)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS)
    fast.save_pretrained(folder)
