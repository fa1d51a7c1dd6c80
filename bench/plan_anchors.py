"""Published measurements that the planner is compared with: what was run, and what came out.

Memory in bytes: `allocated` by PyTorch, or `reserved` with the context, as tools of the driver show
it. Speed in trained tokens a second and GPU, or seconds. Software says what a run had and this
trainer has not: overlapped dispatch, one copy a node, weight gradients summed inside the product.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from iwopd_megatron.config.models import Layout
from iwopd_megatron.hf.known_models import known_model
from iwopd_megatron.plan.memory import Precision
from iwopd_megatron.plan.model_size import ModelSize
from iwopd_megatron.plan.time import Software

GB, GIB = 1e9, 2**30
OVERLAPPED = Software(hidden_dispatch=0.9, fused_gradients=True)
HYBRID = Software(one_copy_a_node=True, fused_gradients=True)
HYBRID_OVERLAPPED = Software(0.9, True, True)
FUSED = Software(fused_gradients=True)
COUNTED: dict[str, Any] = {
    "account_for_embedding_in_pipeline_split": True,
    "account_for_loss_in_pipeline_split": True,
}
BF16_GRADIENTS = Precision(gradient=2)


def qwen3(name: str) -> ModelSize:
    return ModelSize.of(known_model(name))


MOE_30B, MOE_235B = qwen3("Qwen3-30B-A3B"), qwen3("Qwen3-235B-A22B")
QWEN25_7B = ModelSize(3584, 18944, 28, 3584, 512, 28, 128, 4, 152064, False, 0, 1)


@dataclass(frozen=True)
class Training:
    """A training step: global batch of `sequences` of `length` tokens, `micro` at a time."""

    what: str
    source: str
    size: ModelSize
    layout: Layout
    gpu: str
    gpus: int
    length: int
    micro: int
    sequences: int
    recompute: str
    tokens_per_second: float | None = None
    allocated: float | None = None
    reserved: float | None = None
    software: Software = Software()
    precision: Precision = Precision()
    calibrated: bool = False


def _tokens(tflops: float, size: ModelSize, length: int) -> float:
    """Tokens a second of a model-TFLOP/s figure, by Megatron's count: 6 N and causal attention."""
    return tflops * 1e12 / (6 * size.active + 6 * size.layers * length * size.queries)


def _pai(what: str, layout: Layout, micro: int, sequences: int, recompute: str, speed: float):
    source = "Pai-Megatron-Patch issue 658"
    return Training(
        what,
        source,
        MOE_235B,
        layout,
        "h800",
        256,
        4096,
        micro,
        sequences,
        recompute,
        speed,
        software=FUSED,
    )


EP16, CARD = Layout(ep=16), "Megatron-Bridge model card"
PAI_TP1 = Layout(pp=32, vpp=3, ep=8, **COUNTED)
PAI_TP2 = Layout(tp=2, pp=32, vpp=3, ep=8, **COUNTED)
TRAININGS = [
    Training(
        "Qwen3-8B, 16 H100",
        CARD,
        qwen3("Qwen3-8B"),
        Layout(),
        "h100-80",
        16,
        4096,
        1,
        1024,
        "none",
        10456,
        software=FUSED,
        calibrated=True,
    ),
    Training(
        "30B-A3B, 16 H100, overlapped",
        "Megatron-LM PR 5728",
        MOE_30B,
        EP16,
        "h100-80",
        16,
        4096,
        1,
        1024,
        "none",
        _tokens(240.5, MOE_30B, 4096),
        software=OVERLAPPED,
        calibrated=True,
    ),
    Training(
        "30B-A3B, 16 H100, HybridEP overlapped",
        "Megatron-Bridge moe-optimization.md",
        MOE_30B,
        EP16,
        "h100-80",
        16,
        4096,
        1,
        1024,
        "none",
        1024 * 4096 / 16 / 20.147,
        software=HYBRID_OVERLAPPED,
    ),
    Training(
        "the same, A/B control: not overlapped",
        "Megatron-Bridge moe-hardware-configs",
        MOE_30B,
        EP16,
        "h100-80",
        16,
        4096,
        1,
        1024,
        "none",
        _tokens(244.0, MOE_30B, 4096),
        software=HYBRID,
    ),
    Training(
        "the same, A/B: overlapped",
        "Megatron-Bridge moe-hardware-configs",
        MOE_30B,
        EP16,
        "h100-80",
        16,
        4096,
        1,
        1024,
        "none",
        _tokens(287.3, MOE_30B, 4096),
        software=HYBRID_OVERLAPPED,
    ),
    Training(
        "30B-A3B, 16 H100, HybridEP",
        CARD,
        MOE_30B,
        EP16,
        "h100-80",
        16,
        4096,
        1,
        1024,
        "none",
        8654,
        software=HYBRID,
    ),
    Training(
        "30B-A3B, 16 H100, all-to-all",
        "Megatron-Bridge PR 3880",
        MOE_30B,
        EP16,
        "h100-80",
        16,
        4096,
        1,
        1024,
        "none",
        1024 * 4096 / 16 / 42.21,
        61.351 * GB,
        software=FUSED,
        precision=BF16_GRADIENTS,
    ),
    Training(
        "30B-A3B, 16 H100, pp2 vpp24 ep8",
        "NeMo issue 14850, developer",
        MOE_30B,
        Layout(pp=2, vpp=24, ep=8),
        "h100-80",
        16,
        4096,
        1,
        512,
        "none",
        512 * 4096 / 16 / 13.97,
        software=FUSED,
    ),
    Training(
        "the same, run by a user",
        "NeMo issue 14850, user",
        MOE_30B,
        Layout(pp=2, vpp=24, ep=8),
        "h100-80",
        16,
        4096,
        1,
        512,
        "none",
        512 * 4096 / 16 / 26.9,
        53.93 * GB,
        software=FUSED,
        precision=Precision(gradient=2, main=2),
    ),
    Training(
        "235B-A22B, 256 H100, overlapped",
        "Megatron-LM PR 5728",
        MOE_235B,
        Layout(tp=2, pp=8, vpp=4, ep=32, **COUNTED),
        "h100-80",
        256,
        4096,
        1,
        8192,
        "none",
        _tokens(302.0, MOE_235B, 4096),
        software=OVERLAPPED,
    ),
    _pai("235B-A22B, 256 H800, tp1, full", PAI_TP1, 4, 4096, "full", 1540.68),
    _pai("235B-A22B, 256 H800, tp2, full", PAI_TP2, 4, 4096, "full", 1506.76),
    _pai("235B-A22B, 256 H800, tp2, activations", PAI_TP2, 1, 2048, "none", 1461.56),
    _pai("235B-A22B, 256 H800, tp1, experts", PAI_TP1, 1, 2048, "selective", 1428.04),
    Training(
        "30B-A3B, 16 A800, packed 8k",
        "ms-swift qwen3_moe.sh",
        MOE_30B,
        Layout(tp=2, ep=8),
        "a100",
        16,
        8192,
        1,
        16,
        "full",
        16 * 8192 / 16 / 9.6,
        reserved=60 * GIB,
    ),
    Training(
        "30B-A3B, 8 GPUs, packed 8k",
        "ms-swift mcore_bridge/full/moe.sh",
        MOE_30B,
        Layout(tp=4, pp=2, ep=4),
        "a100",
        8,
        8192,
        1,
        4,
        "full",
        4 * 8192 / 8 / 3,
        reserved=76 * GIB,
    ),
    Training(
        "Qwen2.5-7B, 4 A100, packed 32k",
        "ms-swift long_text.sh",
        QWEN25_7B,
        Layout(tp=4),
        "a100",
        4,
        32768,
        1,
        8,
        "full",
        8 * 32768 / 4 / 23,
        reserved=50 * GB,
    ),
]


@dataclass(frozen=True)
class Decoding:
    """Seconds of a token of a single request."""

    what: str
    source: str
    size: ModelSize
    gpu: str
    context: int
    seconds: float
    calibrated: bool = False


TT = "tt-inference-server issue 340"
DECODINGS = [
    Decoding("Qwen3-1.7B, A100, vLLM", TT, qwen3("Qwen3-1.7B"), "a100", 192, 4.6e-3, True),
    Decoding("30B-A3B, A100, vLLM", TT, MOE_30B, "a100", 192, 9.6e-3, True),
    Decoding("30B-A3B, A100, vLLM, 8k", TT, MOE_30B, "a100", 8256, 10.6e-3),
    Decoding("Qwen3-14B, A100, vLLM", TT, qwen3("Qwen3-14B"), "a100", 192, 24.3e-3),
    Decoding(
        "Qwen3-0.6B, H20, SGLang",
        "Qwen speed benchmark",
        qwen3("Qwen3-0.6B"),
        "h20",
        1024,
        1 / 414.17,
    ),
]


@dataclass(frozen=True)
class Round:
    """A GRPO step of NeMo-RL 0.6 on H100s: as many samples as `samples`, mean length `length`.

    On policy the same GPUs generate, then score old log-probs, then train; one step off, half of
    them generate meanwhile.
    """

    what: str
    size: ModelSize
    layout: Layout
    gpus: int
    samples: int
    length: int
    limit: int
    tp: int  # of a server
    seconds: float
    recompute: str
    generating: int | None = None  # GPUs that only generate
    calibrated: bool = False


ROUNDS = [
    Round(
        "30B-A3B, 32 H100",
        MOE_30B,
        Layout(ep=8),
        32,
        2048,
        3203,
        4096,
        2,
        192,
        "none",
        calibrated=True,
    ),
    Round(
        "30B-A3B, 32 H100, one step off",
        MOE_30B,
        Layout(pp=2, ep=8),
        16,
        2048,
        3201,
        4096,
        2,
        152,
        "none",
        16,
    ),
    Round(
        "235B-A22B, 128 H100",
        MOE_235B,
        Layout(tp=2, pp=8, cp=2, ep=16, **COUNTED),
        128,
        512,
        5698,
        8192,
        16,
        395,
        "full",
    ),
    Round(
        "235B-A22B, 256 H100",
        MOE_235B,
        Layout(tp=2, pp=8, cp=2, ep=16, **COUNTED),
        256,
        512,
        5713,
        8192,
        16,
        312,
        "full",
    ),
]
