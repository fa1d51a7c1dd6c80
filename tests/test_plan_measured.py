"""The planner's memory formulas against Megatron models, measured: exact where they can be."""

from dataclasses import replace
from importlib.metadata import version

import pytest
import torch
import torch.distributed as dist
from packaging.version import Version
from plan_sizes import EXPERTS, SIZES
from worlds import run_world

from iwopd_megatron.config.models import Layout
from iwopd_megatron.config.recipe import Train
from iwopd_megatron.hf.config import parse_hf_config
from iwopd_megatron.hf.families import FAMILIES
from iwopd_megatron.models.gpt import build_model, wrap_precision
from iwopd_megatron.models.optimizer import build_optimizer, wrap_data_parallel
from iwopd_megatron.plan.activations import layer_bytes
from iwopd_megatron.plan.memory import Precision, head_bytes, states
from iwopd_megatron.plan.model_size import ModelSize
from iwopd_megatron.runtime.parallel import initialise, packed_seq_params, shutdown

DENSE = parse_hf_config(SIZES, "dense")
TIED = parse_hf_config(SIZES | {"tie_word_embeddings": True}, "tied")
MOE = parse_hf_config(SIZES | EXPERTS, "moe")

LLAMA = parse_hf_config(SIZES | {"model_type": "llama"}, "llama")
QWEN2 = parse_hf_config(SIZES | {"model_type": "qwen2"}, "qwen2")
SHARED = {"model_type": "qwen2_moe", "shared_expert_intermediate_size": 160}
QWEN2_MOE = parse_hf_config(SIZES | EXPERTS | SHARED, "qwen2_moe")
DENSE_FIRST = {"model_type": "glm4_moe", "n_routed_experts": 12, "attention_bias": True}
DENSE_FIRST["num_experts_per_tok"] = 3
GLM4_MOE = parse_hf_config(SIZES | EXPERTS | DENSE_FIRST, "glm4_moe")
NORMED = parse_hf_config(SIZES | EXPERTS | DENSE_FIRST | {"use_qk_norm": True}, "glm4_moe")
LATENT = FAMILIES["deepseek_v3"].sample | {"model_type": "deepseek_v3"}
LATENTS = parse_hf_config(LATENT, "deepseek_v3")
PLAIN_QUERIES = parse_hf_config(LATENT | {"q_lora_rank": None, "n_group": 1}, "deepseek_v3")
WIDE_VALUES = replace(PLAIN_QUERIES, v_head_dim=PLAIN_QUERIES.head_dim)

# world, config, axes, dtype, distributed optimizer
CASES = [
    (1, MOE, {}, "fp32", False),
    (2, MOE, {"ep": 2}, "bf16", True),
    (2, MOE, {"tp": 2}, "bf16", True),
    (2, TIED, {"pp": 2}, "bf16", True),
    (2, TIED, {"pp": 2, "num_layers_in_first_pipeline_stage": 1}, "bf16", True),
    (2, MOE, {"pp": 2, "pipeline_model_parallel_layout": "E|t*4L"}, "bf16", True),
    (4, MOE, {"tp": 2, "pp": 2, "ep": 2}, "bf16", True),
    (4, MOE, {"ep": 2}, "fp32", True),
    (4, MOE, {"tp": 2, "etp": 2}, "bf16", True),
    (4, DENSE, {"tp": 2, "cp": 2}, "bf16", True),
    (4, DENSE, {"tp": 2}, "bf16", False),
    (1, LLAMA, {}, "fp32", False),
    (2, QWEN2, {"tp": 2}, "bf16", True),
    (2, QWEN2, {"pp": 2}, "bf16", True),
    (2, QWEN2_MOE, {"tp": 2}, "bf16", True),
    (4, QWEN2_MOE, {"tp": 2, "pp": 2, "ep": 2}, "bf16", True),
    (2, GLM4_MOE, {"tp": 2}, "bf16", True),
    (2, replace(NORMED, first_k_dense_replace=2), {"pp": 2}, "bf16", True),
    (4, replace(NORMED, first_k_dense_replace=3), {"tp": 2, "pp": 2, "ep": 2}, "bf16", True),
    (1, PLAIN_QUERIES, {}, "fp32", False),
    (2, LATENTS, {"tp": 2}, "bf16", True),
    (4, LATENTS, {"tp": 2, "pp": 2, "ep": 2}, "bf16", True),
]


def measure(hf, layout, dtype, distributed):
    """Bytes of weights, gradients and optimiser states of this rank, and its pipeline stage."""
    parallel = initialise(layout)
    wrapped = wrap_data_parallel(
        wrap_precision(build_model(hf, parallel, dtype)), Train(distributed_optimizer=distributed)
    )
    optimizer = build_optimizer(wrapped, Train(distributed_optimizer=distributed))
    parameters = [p for chunk in wrapped for p in chunk.parameters()]
    weights = sum(p.numel() * p.element_size() for p in parameters)
    gradients = sum(p.main_grad.numel() * p.main_grad.element_size() for p in parameters)
    held = 0
    for part in optimizer.chained_optimizers:
        for state in part.optimizer.state.values():
            moments = state["exp_avg"], state["exp_avg_sq"]
            held += sum(t.numel() * t.element_size() for t in moments)
        if dtype == "bf16":  # the fp32 weights that are stepped
            groups = part.optimizer.param_groups
            held += sum(p.numel() * p.element_size() for g in groups for p in g["params"])
    return parallel, weights, gradients, held


def check_states(cases):
    problems = []
    for world, hf, axes, dtype, distributed in cases:
        layout, size = Layout(**axes), ModelSize.of(hf)
        parallel, *found = measure(hf, layout, dtype, distributed)
        stage = parallel.pp.rank
        planned = states(size, layout, world, Precision.of(dtype), stage, distributed)
        expected = [planned.weights, planned.gradients, planned.optimizer]
        # Shards of the distributed optimizer are cut anywhere: only their sum is exact.
        total = torch.tensor([found[2], planned.optimizer], dtype=torch.float64)
        dist.all_reduce(total)
        if found[:2] != expected[:2] or total[0] != total[1]:
            problems.append((axes, dtype, distributed, stage, found, expected, total.tolist()))
    shutdown()
    assert not problems, problems


@pytest.mark.parametrize("world", [1, 2, 4])
def test_weights_gradients_and_optimizer_are_exactly_what_megatron_allocates(world):
    run_world(world, check_states, [case for case in CASES if case[0] == world], limit=90)


def saved_bytes(hf, tokens):
    """Distinct storages that autograd keeps of one forward pass, parameters left out."""
    parallel = initialise(Layout())
    (model,) = build_model(hf, parallel)
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes(), tensor  # alive: no address is used twice
        return tensor

    ids, packing = torch.randint(0, 512, (1, tokens)), packed_seq_params([tokens])
    positions = torch.arange(tokens)[None]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(ids, positions, None, packed_seq_params=packing)
    return sum(size for size, _ in kept.values())


def check_activations(hf):
    """Of four layers more, of a model's last kind, and then of its first."""

    def kept(layers, dense):
        return saved_bytes(replace(hf, num_hidden_layers=layers, first_k_dense_replace=dense), 256)

    size, first = ModelSize.of(hf), hf.first_k_dense_replace
    compare_activations(size, (kept(6, first) - kept(2, first)) / 4)
    if first:
        compare_activations(size.dense, (kept(6, 5) - kept(2, 1)) / 4)
    shutdown()


def compare_activations(size, measured):
    tokens, width = 256, 4
    planned = layer_bytes(size, Layout(), "none", width) * tokens
    if Version(version("megatron-core")) < Version("0.17"):
        planned -= 3 * size.experts * tokens
    planned += 8 * size.experts  # tokens of every expert, counted twice, of the whole micro-batch
    assert planned == measured, (planned - measured) / tokens


@pytest.mark.parametrize(
    "hf",
    [DENSE, MOE, LLAMA, QWEN2, QWEN2_MOE, GLM4_MOE, NORMED, LATENTS, WIDE_VALUES],
    ids=lambda hf: hf.model_type,
)
def test_activations_of_a_layer_are_exactly_what_autograd_keeps(hf):
    run_world(1, check_activations, hf)


def test_head_workspace_is_what_an_h200_used():
    """bench/gpu_head.py: 8,192 tokens, Qwen3-30B-A3B's head; the gradient formed in the forward."""
    size = ModelSize.of(replace(DENSE, vocab_size=151936, hidden_size=2048))
    planned = head_bytes(size, Layout(), 8192) / 2**20
    assert 2439 <= planned <= 1.05 * 2439
