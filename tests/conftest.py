"""One thread, no GPU unless CUDA_VISIBLE_DEVICES names one, and tiny Hugging Face folders."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # the tests fork, and expect gloo and fp32

import torch  # noqa: E402

torch.set_num_threads(1)

from pathlib import Path  # noqa: E402

import pytest  # noqa: E402

SHAPE = dict(
    vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=4,
    num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=256,
    rms_norm_eps=1e-6,
)  # fmt: skip
EXPERTS = dict(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=32)


@torch.no_grad()
def _write_folder(folder: Path, kind: str, **settings) -> Path:
    """A model whose every kind of weight matters: norms not at one, routers that choose."""
    import transformers

    config = getattr(transformers, f"{kind}Config")(**SHAPE, **settings)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).float()
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name:
            parameter.copy_(1 + 0.2 * noise)
        else:
            parameter.copy_((0.5 if "mlp.gate.weight" in name else 0.08) * noise)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def moe_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hf") / "moe"
    return _write_folder(folder, "Qwen3Moe", **EXPERTS, norm_topk_prob=True)


@pytest.fixture(scope="session")
def moe_no_norm_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hf") / "moe_no_norm"
    return _write_folder(folder, "Qwen3Moe", **EXPERTS, norm_topk_prob=False)


@pytest.fixture(scope="session")
def dense_folder(tmp_path_factory) -> Path:
    return _write_folder(
        tmp_path_factory.mktemp("hf") / "dense", "Qwen3", tie_word_embeddings=False
    )


@pytest.fixture(scope="session")
def tied_folder(tmp_path_factory) -> Path:
    return _write_folder(tmp_path_factory.mktemp("hf") / "tied", "Qwen3", tie_word_embeddings=True)
