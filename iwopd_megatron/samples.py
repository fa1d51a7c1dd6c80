"""A few of a round's samples, kept for a reader: text, tokens, gaps and weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from iwopd_megatron import device
from iwopd_megatron.data import Problem
from iwopd_megatron.trajectory import Trajectory
from iwopd_megatron.weighting import token_weights_packed

KEPT = 8


def keep_samples(
    run: Path,
    round_number: int,
    samples: list[Trajectory],
    problems: list[Problem],
    tokenizer: Any,
    weighting: dict[str, Any],
) -> None:
    """Write the round's first samples to samples/round_<n>.jsonl; gaps are against the engine.

    weighting: the settings of `token_weights_packed`, those of the round's training.
    """
    lines = []
    for sample, problem in list(zip(samples, problems, strict=True))[:KEPT]:
        gap = torch.tensor(sample.teacher_logp) - torch.tensor(sample.rollout_logp)
        gap = gap.to(device.current_device())
        segment_ids, mask = torch.zeros_like(gap).long(), torch.ones_like(gap).bool()
        weight = token_weights_packed(gap, segment_ids, mask, **weighting)
        lines.append({
            "prompt": problem.question,
            "response": tokenizer.decode(sample.response_ids),
            "answer": problem.answer,
            "correct": bool(sample.correct),
            "tokens": [tokenizer.decode([token]) for token in sample.response_ids],
            "gap": gap.tolist(),
            "weight": weight.tolist(),
        })  # fmt: skip
    folder = run / "samples"
    folder.mkdir(exist_ok=True)
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (folder / f"round_{round_number:06d}.jsonl").write_text(text, encoding="utf-8")
