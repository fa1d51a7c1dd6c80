"""The weight table against every published size, by shapes alone: no weight is allocated."""

import re
from types import SimpleNamespace

import pytest
import torch

from iwopd_megatron.hf.config import parse_hf_config
from iwopd_megatron.hf.known_models import known_model, known_models
from iwopd_megatron.hf.shapes import hf_names, hf_shape, rows_in_order
from iwopd_megatron.weights.table import mapped_parameters, weight_blocks
from iwopd_megatron.weights.torch_dist.writer import block_shape, expected_tensors
from iwopd_megatron.weights.transformers_views import named_views

# Parameters, in billions, as the models' cards or their names say; one of each shape.
BILLIONS = {
    "Qwen3-0.6B": 0.596,
    "Qwen3-1.7B": 1.721,
    "Qwen3-4B": 4.022,
    "Qwen3-30B-A3B": 30.53,
    "Qwen3-235B-A22B": 235.09,
    "Llama-3.2-1B": 1.236,
    "Llama-3.2-3B": 3.213,
    "Llama-3.1-8B": 8.030,
    "Llama-3.1-70B": 70.55,
    "SmolLM2-135M": 0.1345,
    "SmolLM2-360M": 0.3618,
    "SmolLM2-1.7B": 1.711,
    "Qwen2.5-0.5B": 0.494,
    "Qwen2.5-1.5B": 1.544,
    "Qwen2.5-3B": 3.086,
    "Qwen2.5-7B": 7.616,
    "Qwen2.5-14B": 14.77,
    "Qwen2.5-32B": 32.76,
    "Qwen2.5-72B": 72.71,
    "Mistral-7B-v0.3": 7.248,
    "Mistral-Nemo-Base-2407": 12.248,
    "Mistral-Small-24B-Base-2501": 23.572,
    "Qwen1.5-MoE-A2.7B": 14.316,
    "Qwen2-57B-A14B": 57.41,
    # Without the layer that predicts a second token, which counts in the cards' 106 and 355.
    "GLM-4.5-Air": 106.85,
    "GLM-4.5": 352.80,
    "GLM-4.6": 352.80,
    "GLM-4.7": 352.80,
}


@pytest.fixture(scope="module", params=BILLIONS)
def model(request):
    """(size, config, name -> tensor without storage) of transformers' own model."""
    import transformers

    hf = known_model(request.param)
    sizes = known_models()[request.param] | {"head_dim": hf.head_dim}
    kind = hf.family.transformers
    config = getattr(transformers, f"{kind}Config")(**sizes)
    assert parse_hf_config(config.to_dict(), "config.json") == hf
    with torch.device("meta"):
        whole = getattr(transformers, f"{kind}ForCausalLM")(config)
    return request.param, hf, named_views(whole)


def test_every_tensor_has_one_place(model):
    size, hf, tensors = model
    total = sum(x.numel() for x in tensors.values())
    assert total / 1e9 == pytest.approx(BILLIONS[size], rel=2e-3)
    for names in ("native", "te"):
        found = [(name, block) for block in weight_blocks(hf, names) for name in block.hf_names]
        assert sorted(name for name, _ in found) == sorted(tensors) == sorted(hf_names(hf))
        assert {name: hf_shape(name, hf) for name, _ in found} == {
            name: tuple(x.shape) for name, x in tensors.items()
        }
        elements = sum(torch.Size(s).numel() for s in expected_tensors(hf, names).values())
        assert elements == total


def shards(block, hf, tensors, size):
    sources = [tensors[name] for name in block.hf_names]
    return [block.sharding.shard(sources, rank, size, hf) for rank in range(size)]


@pytest.mark.parametrize("degree", [1, 2, 4])
def test_cuts_over_tensor_parallel_ranks_join_again(degree, model):
    """tp for what every token meets, etp for experts: equal shards, whose join is the whole."""
    _, hf, tensors = model
    if hf.num_key_value_heads % degree:
        pytest.skip("its heads cannot be cut so")
    layers = {0, hf.first_k_dense_replace, hf.num_hidden_layers - 1}
    for block in weight_blocks(hf):
        layer = re.search(r"layers\.(\d+)\.", block.hf_names[0])
        if layer is not None and int(layer[1]) not in layers:
            continue
        parts = shards(block, hf, tensors, degree)
        assert len({tuple(x.shape) for x in parts}) == 1
        if degree == 1:
            assert tuple(parts[0].shape) == block_shape(block, hf)
        back = block.sharding.unshard(parts, hf)
        assert [tuple(x.shape) for x in back] == [hf_shape(name, hf) for name in block.hf_names]
        is_cut = parts[0].numel() * degree == sum(x.numel() for x in back)
        assert is_cut or any(whole in block.key for whole in ("norm", "router", "gate_weight"))


def test_experts_and_layers_are_dealt_without_gaps(model):
    """Over ep ranks and pipeline stages, chunk by chunk, every tensor is read exactly once."""
    _, hf, tensors = model
    experts = hf.num_experts
    for ep, stages in ((1, 1), (8, 2)):
        seen = []
        for stage in range(stages):
            for rank in range(ep if experts else 1):
                local = range(rank * experts // ep, (rank + 1) * experts // ep)
                chunk = stand_in(hf, stage, stages, list(local), is_first_rank=rank == 0)
                seen += [
                    name
                    for mapped in mapped_parameters(chunk, hf)
                    if not mapped.is_copy
                    for name in mapped.hf_names
                ]
        assert sorted(seen) == sorted(tensors)


def stand_in(hf, stage, stages, local, is_first_rank):
    """Megatron's parameter names of one rank of one stage, as `mapped_parameters` reads them."""
    count = hf.num_hidden_layers // stages
    first = stage * count
    names = []
    for row, numbers in rows_in_order(hf):
        if row.is_of_layer:
            is_here = numbers["layer"] in range(first, first + count)
        else:
            is_here = stage == (0 if row.parameter.startswith("embedding") else stages - 1)
        if is_here and (numbers["expert"] in local if row.is_of_expert else is_first_rank):
            layer, expert = numbers.get("layer", 0) - first, numbers.get("expert", 0)
            names.append(row.parameter.format(layer=layer, expert=expert - min(local, default=0)))
    layers = [
        SimpleNamespace(layer_number=first + i + 1, mlp=SimpleNamespace(local_expert_indices=local))
        for i in range(count)
    ]
    tensors = {name: torch.empty(0, device="meta") for name in names}
    buffers = {name: x for name, x in tensors.items() if name.endswith("expert_bias")}
    return SimpleNamespace(
        named_parameters=lambda: [x for x in tensors.items() if x[0] not in buffers],
        named_buffers=buffers.items,
        decoder=SimpleNamespace(layers=layers),
    )
