"""The empty objects beside a checkpoint's weights, which Megatron's load asks for. No torch."""

from __future__ import annotations

from iwopd_megatron.hf.config import HfConfig

_LINEARS = ["self_attention.linear_qkv", "self_attention.linear_proj"]
_SHARED = ["mlp.shared_experts.linear_fc1", "mlp.shared_experts.linear_fc2"]
_QK_NORMS = ["self_attention.q_layernorm", "self_attention.k_layernorm"]


def object_keys(hf: HfConfig, names: str) -> list[str]:
    """Return names of the empty `_extra_state` objects that Megatron's load asks for.

    `<module>._extra_state/shard_<offset>_<shape>`, by Megatron's ShardedObject, of modules that
    may keep a state of their own, for which Megatron stores None beside the weights.
    """
    keys = []
    for layer in range(hf.num_hidden_layers):
        prefix, place = "decoder.layers.", [(layer, hf.num_hidden_layers)]
        if hf.first_k_dense_replace:
            prefix, place = f"decoder.layers.{layer}.", []
        modules = _modules(hf, names, hf.has_experts(layer))
        keys += [f"{prefix}{module}.{_shard(place or [(0, 1)])}" for module in modules]
        keys += [
            f"{prefix}mlp.experts.experts.{fc}.{_shard([*place, (expert, hf.num_experts)])}"
            for fc in ("linear_fc1", "linear_fc2")
            for expert in range(hf.num_experts * hf.has_experts(layer))
        ]
    return keys + ["decoder.final_layernorm._extra_state/shard_0_1"] * (names == "te")


def _modules(hf: HfConfig, names: str, has_experts: bool) -> list[str]:
    """Return a layer's modules that may keep a state of their own, but its routed experts."""
    found = _LINEARS + _QK_NORMS * (names == "te" and hf.qk_norm)
    if not has_experts:
        return [*found, "mlp.linear_fc1", "mlp.linear_fc2"]
    if names == "te":
        found = [*found, "pre_mlp_layernorm"]  # of a dense layer it is inside mlp.linear_fc1
    return found + _SHARED * (hf.shared_expert_intermediate_size > 0)


def _shard(place: list[tuple[int, int]]) -> str:
    """Return the end of an object's name, of its (offset, size) in every stacked dim."""
    offset, shape = (".".join(map(str, numbers)) for numbers in zip(*place, strict=True))
    return f"_extra_state/shard_{offset}_{shape}"
