"""What `make gpu-check` runs on a GPU, at toy size on a CPU: tables have rows, parity holds."""

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def gpu_check(monkeypatch):
    """The script as a module, its models and repetitions cut down."""
    before = dict(os.environ)
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import gpu_check as module

    small = dict(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=512,
        intermediate_size=64,
    )
    slices = {name: {**hf, **small} for name, hf in module.SLICES.items()}
    for hf in slices.values():
        if "num_experts" in hf:
            hf.update(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=32)
    monkeypatch.setattr(module, "SLICES", slices)
    monkeypatch.setattr(module, "LENGTHS", {"8 x 1024 tokens": [16] * 8, "1": [32]})
    monkeypatch.setattr(module, "STEPS", 2)
    monkeypatch.setattr(module, "WARM_UP", 1)
    yield module
    for name in ("gpu_check", "gpu_checkpoint"):
        sys.modules.pop(name, None)
    os.environ.clear()
    os.environ.update(before)


def test_every_table_of_the_gpu_check(gpu_check, capsys):
    assert gpu_check.parity_table()
    gpu_check.demo_table()
    results = gpu_check.step_table()
    assert len(results) == 6 and all(value > 0 for value in results.values())
    printed = capsys.readouterr().out
    assert printed.count("| agrees |") == 2
    assert "| fp32 | " in printed and "| bf16 | " in printed


def test_checkpoints_of_the_gpu_check(gpu_check, capsys, monkeypatch):
    import gpu_checkpoint

    assert gpu_checkpoint.check("native") == 0
    write = gpu_checkpoint.write_models
    monkeypatch.setattr(gpu_checkpoint, "write_models", lambda folder: write(folder)[:1])
    assert gpu_checkpoint.check("te") == 2  # not the names of the modules used here
    assert "input_layernorm" in capsys.readouterr().out


def test_without_a_gpu_it_says_what_to_do(gpu_check, monkeypatch):
    monkeypatch.setattr(gpu_check.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="needs a CUDA GPU"):
        gpu_check.main()
