"""GPUs that the planner knows, and the share of their peaks that software reaches.

Peaks are dense (no sparsity) and per direction, from the makers' data sheets: H100 and H200 SXM,
HGX B200, H20 and A100 SXM 80 GB. Network: what DGX and HGX machines of that generation carry, one
adapter a GPU. Rates are measured anchors; `bench/plan.py` lists which were used to calibrate and
prints the errors on all others.
"""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """Peaks of one GPU."""

    memory: float  # bytes a process can allocate
    tflops: float  # FLOP/s, bf16, dense
    hbm: float  # bytes/s
    nvlink: float  # bytes/s, one direction
    network: float  # bytes/s, one direction, one GPU's adapter


GPUS = {
    "h100-80": Gpu(79.1 * GIB, 989e12, 3.35e12, 450e9, 50e9),
    "h200": Gpu(139.8 * GIB, 989e12, 4.8e12, 450e9, 50e9),
    "b200": Gpu(178.0 * GIB, 2250e12, 7.7e12, 900e9, 50e9),
    "h20": Gpu(95.0 * GIB, 148e12, 4.0e12, 450e9, 50e9),
    "a100": Gpu(79.1 * GIB, 312e12, 2.04e12, 300e9, 25e9),
    "h800": Gpu(79.1 * GIB, 989e12, 3.35e12, 200e9, 50e9),  # published measurements only
}


@dataclass(frozen=True)
class Rates:
    """Shares of a peak that are reached (no unit), and seconds that no peak explains."""

    # Bare LM-head products forward and backward, N 8192, D 4096, V 151936: 728 of 989 TFLOP/s on an
    # H100 (TRL issue 7244).
    gemm: float = 0.736
    # TransformerEngine's grouped products of 8 experts, 4096 rows each, (768, 2048): 628 of 989
    # TFLOP/s (TransformerEngine pull request 2045).
    grouped_gemm: float = 0.635
    # Causal flash attention, head size 128: about half of the peak forward, less backward.
    attention: float = 0.45
    hbm: float = 0.85  # of a streaming kernel
    link: float = 0.8  # of a large message
    # Calibrated: times that the bytes saved for backward pass through memory, forward and backward;
    # Qwen3-8B, 16 H100 (Megatron-Bridge's model card, 512.7 TFLOP/s).
    passes: float = 6.8
    # Calibrated: permutation, host waits and launches of an MoE layer, forward and backward;
    # Qwen3-30B-A3B, 16 H100, overlapped dispatch (Megatron-LM pull request 5728, 240.5 TFLOP/s).
    moe_layer: float = 2.7e-3  # seconds
    dense_layer: float = 0.2e-3  # seconds
    # Calibrated on single requests: launches of one layer of a decode step under CUDA graphs;
    # Qwen3-1.7B and Qwen3-30B-A3B, vLLM on an A100 (tt-inference-server issue 340).
    decode_layer: float = 75e-6  # seconds
    decode_moe_layer: float = 110e-6  # seconds
    decode_all_reduce: float = 15e-6  # seconds: latency of a small all-reduce in a node
    decode_hbm: float = 0.8
    # Calibrated: a whole round over its parts run alone, which host work, uneven batches and
    # waiting add; GRPO on Qwen3-30B-A3B, 32 H100, 192 s a step (NeMo-RL performance summary).
    system: float = 1.68


RATES = Rates()

# Bytes that no formula of tensors covers: CUDA context and libraries, NCCL's channels.
CONTEXT = 1.6e9
# Reserved over allocated memory of PyTorch's allocator. Published pairs: 1.03, 1.07, 1.08, 1.11 and
# 1.13 (Megatron-Bridge's model cards of two models, NeMo issue 14850, Megatron-LM issue 756).
FRAGMENTATION = 1.08
