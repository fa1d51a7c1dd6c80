"""A verifiable task whose errors compound: sort letters by writing out a selection sort's steps.

To `glaehdck=` a right response is `aglehdck` `cglehdk` `dglehk` ... without any separator: the
smallest letter, then the letters left, until none are. Where the next letter comes from has to be
counted out, so a writer who once drops or doubles a letter loses the thread, and so does a reader
who never saw that happen. The sloppy writer slips mostly early and is lost after the first slip.
Same JSONL schema as the real data sets, plus `response` where a model is fine-tuned on it.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

SOURCE = "selection_sort"
ALPHABET = "abcdefghijkl"
PAD, EOS, UNUSED = "<pad>", "<eos>", "<unused>"
SYMBOLS = [PAD, EOS, "=", *ALPHABET, UNUSED]  # 16: divisible by any tensor-parallel size used here
LETTERS = 8  # letters to sort; a right response has 36 letters and EOS
SLIP = 0.12  # the sloppy writer's chance of a wrong pick, and of a wrong copy, in the first step
SLIP_DECAY = 4  # falls with the fourth power of the letters left
TEACHER_ROUNDS, STUDENT_ROUNDS = 500, 800  # of 64 problems each: what recipes/demo_*.yaml train on
EVAL_SEED = 999  # of the held-out problems
MODEL = {
    "vocab_size": len(SYMBOLS),
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 128,
    "moe_intermediate_size": 64,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "max_position_embeddings": 128,
    "rope_theta": 1e4,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.1,
    "pad_token_id": SYMBOLS.index(PAD),
    "eos_token_id": SYMBOLS.index(EOS),
    "bos_token_id": None,
    "architectures": ["Qwen3MoeForCausalLM"],
}
MODELS = {
    "teacher": {"hidden_size": 96, "num_attention_heads": 4, "num_experts": 8},
    "student": {"hidden_size": 64, "num_attention_heads": 2, "num_experts": 4},
}
LOST = 0.9  # the same chance in every step after the first slip


def write_trace(letters: list[str], rng: random.Random, slip: float = 0.0) -> str:
    """Return the response to a list of letters; with `slip` > 0, the sloppy writer's."""
    rest, trace, is_lost = list(letters), "", False
    for _ in letters:
        if not rest:
            break
        chance = slip * ((len(rest) - 1) / (len(letters) - 1)) ** SLIP_DECAY
        if slip and is_lost:
            chance = LOST
        picks_wrong = rng.random() < chance and len(rest) > 1
        copies_wrong = rng.random() < chance and len(rest) > 1
        pick = min(rest)
        if picks_wrong:
            pick = rng.choice([x for x in rest if x != pick] or [pick])
        rest.remove(pick)
        if copies_wrong:
            place = rng.randrange(len(rest))
            if rng.random() < 0.5:
                rest.pop(place)
            else:
                rest.insert(place, rng.choice(ALPHABET))
        is_lost = is_lost or picks_wrong or copies_wrong
        trace += pick + "".join(rest)
    return trace


def problems(seed: int, slip: float | None = None) -> Iterator[dict[str, Any]]:
    """Yield endless lines of a data file, a function of the seed; no response if `slip` is None."""
    rng = random.Random(seed)
    while True:
        letters = rng.sample(ALPHABET, LETTERS)
        problem = {
            "question": "".join(letters) + "=",
            "answer": "".join(sorted(letters)),
            "difficulty": LETTERS,
            "source": SOURCE,
        }
        yield problem if slip is None else problem | {"response": write_trace(letters, rng, slip)}


def is_right(response: str, answer: str) -> bool:
    """Return whether the letters at the picks' places are the sorted ones and none is missing."""
    count = len(answer)
    picks = [sum(range(count, count - step, -1)) for step in range(count)]
    return len(response) == sum(range(count + 1)) and "".join(response[i] for i in picks) == answer


def write_jsonl(path: Path, *parts: Iterator[dict[str, Any]]) -> None:
    """Write one JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for part in parts for line in part))


def write_task(folder: Path) -> None:
    """Write what the demo is made from: data, tokenizer and model configurations.

    train, eval: prompts. teacher: clean traces. student: clean traces, then as many sloppy ones.
    """
    write_jsonl(folder / "train.jsonl", islice(problems(seed=1), 2048))
    write_jsonl(folder / "eval.jsonl", islice(problems(seed=EVAL_SEED), 512))
    teacher = islice(problems(seed=2, slip=0.0), 64 * TEACHER_ROUNDS)
    write_jsonl(folder / "teacher.jsonl", teacher)
    half = 64 * STUDENT_ROUNDS // 2
    clean, sloppy = problems(seed=3, slip=0.0), problems(seed=4, slip=SLIP)
    write_jsonl(folder / "student.jsonl", islice(clean, half), islice(sloppy, half))
    for name in MODELS:
        write_model(folder / name, name)


def toy_config(name: str) -> dict[str, Any]:
    """Return config.json of the task's teacher or student, as far as this task sets it."""
    return MODEL | MODELS[name]


def write_model(folder: Path, name: str) -> None:
    """Write a Qwen3-MoE configuration and the character-level tokenizer, without weights."""
    from transformers import GenerationConfig, Qwen3MoeConfig

    config = Qwen3MoeConfig(**toy_config(name))
    config.save_pretrained(folder)
    GenerationConfig.from_model_config(config).save_pretrained(folder)
    write_tokenizer(folder)


def write_tokenizer(
    folder: Path,
    symbols: Sequence[str] = SYMBOLS,
    pad: str = PAD,
    eos: str = EOS,
    unknown: str = UNUSED,
) -> None:
    """Write a Hugging Face tokenizer of one token a character, ids in the order of `symbols`."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {symbol: i for i, symbol in enumerate(symbols)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, eos_token=eos, unk_token=unknown
    )
    fast.save_pretrained(folder)
