"""What runs of two sizes have at most, against what plan/host.py says that they need.

Proportional set sizes (smaps_rollup) of the run's processes, added up every 50 ms.
"""

import contextlib
import subprocess
import sys
import time

import psutil
import pytest
import yaml

from iwopd_megatron.config.recipe import Recipe
from iwopd_megatron.parity.rehearse import write_model
from iwopd_megatron.plan.host import Needs
from iwopd_megatron.toy_task import problems, write_jsonl, write_tokenizer

CONFIG = dict(
    vocab_size=49152, head_dim=64, num_attention_heads=8, num_key_value_heads=4,
    max_position_embeddings=1024, rms_norm_eps=1e-6, pad_token_id=0, eos_token_id=1,
    tie_word_embeddings=True,
)  # fmt: skip
SIZES = {
    "one process": (dict(hidden_size=1024, intermediate_size=2048, num_hidden_layers=4), 1),
    "two processes": (dict(hidden_size=768, intermediate_size=1536, num_hidden_layers=2), 2),
}


def held(root):
    """Bytes of a process and all under it, pages that they share divided by those who do."""
    total = 0
    with contextlib.suppress(psutil.Error):
        for process in [root, *root.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                total += process.memory_full_info().pss
    return total


@pytest.mark.parametrize("size", SIZES)
def test_needs_are_what_a_run_has_at_most(size, tmp_path):
    shape, world = SIZES[size]
    for name in ("student", "teacher"):
        write_model(tmp_path / name, CONFIG | shape)
        write_tokenizer(tmp_path / name)
    rows = (row for row, _ in zip(problems(1), range(32), strict=False))
    write_jsonl(tmp_path / "train.jsonl", rows)
    tree = {
        "out": str(tmp_path / "run"),
        "processes": world,
        "student": {"hf": str(tmp_path / "student")},
        "teacher": {"hf": str(tmp_path / "teacher"), "offload": True},
        "data": {"train": str(tmp_path / "train.jsonl")},
        "rollout": {"max_prompt_tokens": 16, "max_response_tokens": 96},
        "train": {"rounds": 2, "prompts_per_round": 8, "microbatch_tokens": 448, "lr": 1e-5},
        "checkpoint": {"every": 1, "keep": 1},
        "gates": {"max_truncation_jump": 1.0},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    command = [sys.executable, "-m", "iwopd_megatron", "train", str(tmp_path / "recipe.yaml")]
    most = 0
    with open(tmp_path / "log", "w") as log:
        run = subprocess.Popen(command, stdout=log, stderr=log)
        while run.poll() is None:
            most = max(most, held(psutil.Process(run.pid)))
            time.sleep(0.05)
    assert run.returncode == 0, (tmp_path / "log").read_text()
    needs = Needs(Recipe.model_validate(tree), world)
    print({name: round(value / 2**30, 2) for name, value in needs.phases.items()})
    print(f"{size}: {most / 2**30:.2f} GiB, by formula {needs.most / 2**30:.2f}")
    assert 0.85 < needs.most / most < 1.2
