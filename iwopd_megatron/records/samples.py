"""A few of a round's samples, kept for a reader: text, tokens, gaps and weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from iwopd_megatron.batch.trajectory import Trajectory
from iwopd_megatron.data.problems import Problem
from iwopd_megatron.files.run_files import write_whole
from iwopd_megatron.loss.weighting import StepWeighting, token_weights_packed
from iwopd_megatron.records.token_texts import token_texts
from iwopd_megatron.runtime import device

KEPT = 8
SAMPLE = {"prompt": str, "response": str, "tokens": list, "gap": list, "weight": list}


def keep_samples(
    run: Path,
    round_number: int,
    samples: list[Trajectory],
    problems: list[Problem],
    tokenizer: Any,
    weighting: StepWeighting,
) -> None:
    """Write the round's first KEPT samples to samples/round_<n>.jsonl.

    Gaps are `Trajectory.gaps`, 0 where no loss reads the token. `weight` is by the run's own rule,
    weight_iw and weight_iw_signed by these. weighting: of the round's first optimiser step.
    """
    lines = []
    for sample, problem in list(zip(samples, problems, strict=True))[:KEPT]:
        count = len(sample.response_ids)
        mask = torch.tensor(sample.is_read)
        gap = torch.zeros(count).masked_scatter(mask, torch.tensor(sample.gaps()))
        gap, mask = (x.to(device.current_device()) for x in (gap, mask))
        whole = mask.new_zeros(count).long()
        weight = weighting.packed(gap, whole, mask)
        both = {
            f"weight_{rule}": token_weights_packed(
                gap, whole, mask, rule=rule, gamma=weighting.rule.gamma
            ).tolist()
            for rule in ("iw", "iw_signed")
        }
        lines.append(
            {
                "prompt": problem.prompt,
                "response": tokenizer.decode(sample.response_ids),
                "answer": problem.answer,
                "correct": bool(sample.correct),
                "tokens": token_texts(tokenizer, sample.response_ids),
                "gap": gap.tolist(),
                "weight": weight.tolist(),
                **both,
            }
        )
    folder = run / "samples"
    folder.mkdir(exist_ok=True)
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_whole(folder / f"round_{round_number:06d}.jsonl", text)
