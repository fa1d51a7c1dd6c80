"""A rank's experts and the dense MLP as Megatron's layers want them, on torch's kernels.

Megatron 0.16 builds a layer's parts with `build_module`, later versions by calling them with their
own arguments (`is_mtp_layer`, `name`); classes that take both, and bring their own submodules, do
for all. Shapes: D hidden size, F a local expert's inner size, E local experts, t their tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from iwopd_megatron.models.marks import mark_parameter
from iwopd_megatron.models.native_ops import grouped_mm, swiglu
from iwopd_megatron.runtime import device
from iwopd_megatron.runtime.megatron import (
    MLP,
    ColumnParallelLinear,
    MegatronModule,
    MLPSubmodules,
    MoELayer,
    MoESubmodules,
    RowParallelLinear,
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
    SharedExpertMLP,
)

_FC = {"weight1": "linear_fc1", "weight2": "linear_fc2"}
_EXTRA_STATE = "_extra_state"


def _linears() -> MLPSubmodules:
    return MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)


class SwiGluMLP(MLP):
    """Megatron's dense MLP (parameters, sharding, checkpoints) with one activation pass."""

    def __init__(self, config, pg_collection=None, **_):
        tp_group = None if pg_collection is None else pg_collection.tp
        super().__init__(config, _linears(), tp_group=tp_group)

    def forward(self, hidden, **kwargs):  # routing settings of other MLPs
        gate_up, _ = self.linear_fc1(hidden)
        return self.linear_fc2(swiglu(gate_up))


class SharedSwiGluMLP(SharedExpertMLP):
    """Megatron's shared expert, which every token meets, with one activation pass.

    Where it has a gate, a sigmoid of the token scales its output.
    """

    def __init__(self, config, gate: bool, pg_collection=None, **_):
        super().__init__(config, _linears(), gate, pg_collection)

    def forward(self, hidden):
        gate_up, _ = self.linear_fc1(hidden)
        out, _ = self.linear_fc2(swiglu(gate_up))
        if self.gate_weight is None:
            return out
        return out * F.linear(hidden, self.gate_weight).sigmoid()


class GroupedMoELayer(MoELayer):
    """Megatron's router and dispatcher around GroupedExperts, and beside them the shared expert."""

    def __init__(self, config, pg_collection=None, **_):
        parts = MoESubmodules(experts=GroupedExperts, shared_experts=SharedSwiGluMLP)
        super().__init__(config, parts, pg_collection=pg_collection)


class GroupedExperts(MegatronModule):
    """A rank's experts as two parameters: weight1 `[D, E * 2F]`, weight2 `[E * F, D]`.

    Both are read as `[E, D, 2F]` (gate, then up) and `[E, F, D]`. In a checkpoint they have the
    names, shapes and pieces of Megatron's own experts, one `[2F, D]` and one `[D, F]` an expert.
    """

    def __init__(self, num_local_experts: int, config, pg_collection, name: str | None = None):
        super().__init__(config=config)
        self.num_local_experts = num_local_experts
        self.ep_group, self.tp_group = pg_collection.ep, pg_collection.expt_tp
        self.dp_group = pg_collection.expt_dp
        hidden = config.hidden_size
        wide = num_local_experts * (config.moe_ffn_hidden_size // self.tp_group.size())
        self.weight1 = self._parameter((hidden, 2 * wide), 1, config.init_method)
        self.weight2 = self._parameter((wide, hidden), 0, config.output_layer_init_method)
        self.register_load_state_dict_post_hook(_expect_no_extra_states)

    def _parameter(
        self, shape: tuple[int, int], dim: int, initialise: Callable[[torch.Tensor], object]
    ) -> torch.nn.Parameter:
        """Return an initialised parameter, marked as one that tensor parallelism cuts at `dim`."""
        dtype = self.config.params_dtype
        parameter = torch.nn.Parameter(
            torch.empty(shape, dtype=dtype, device=device.current_device())
        )
        initialise(parameter)
        mark_parameter(parameter, tensor_model_parallel=True, partition_dim=dim, partition_stride=1)
        mark_parameter(parameter, allreduce=self.config.expert_model_parallel_size == 1)
        return parameter

    def forward(self, hidden, tokens_per_expert, probs):
        """Return `[t, D]` of tokens `[t, D]` sorted by expert, each times its `probs`, and None."""
        weight1 = self.weight1.view(self.num_local_experts, self.config.hidden_size, -1)
        weight2 = self.weight2.view(self.num_local_experts, -1, self.config.hidden_size)
        act = swiglu(grouped_mm(hidden, weight1, tokens_per_expert), probs.unsqueeze(-1))
        return grouped_mm(act, weight2, tokens_per_expert), None

    def backward_dw(self) -> None:
        """Do nothing: no weight gradient is put off."""

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None) -> dict[str, Any]:
        """Return the experts as pieces of `[experts, 2F, D]` and `[experts, D, F]`, empty states.

        The format is that of Megatron's SequentialMLP and TEGroupedMLP without
        `singleton_local_shards` (METADATA in weights/torch_dist/writer.py).
        """
        state: dict[str, Any] = {}
        axes, rank = len(sharded_offsets), self.tp_group.rank()
        first, total = (n * self.num_local_experts for n in _place(self.ep_group))
        for name, fc in _FC.items():
            pieces = _ExpertPieces(self, sharded_offsets, gated=name == "weight1")
            key = f"{prefix}experts.{fc}"
            replica = (0, 0, self.dp_group.rank())
            state[prefix + name] = ShardedTensorFactory(
                f"{key}.weight", getattr(self, name), pieces.cut, pieces.join, replica
            )
            for expert in range(first, first + self.num_local_experts):
                _, offset, shape = zip(*sharded_offsets, (axes, expert, total), strict=True)
                state[f"{prefix}expert{expert}.{fc}.{_EXTRA_STATE}"] = ShardedObject(
                    f"{key}.{_EXTRA_STATE}", None, shape, offset, (0, rank, self.dp_group.rank())
                )
        return state


class _ExpertPieces:
    """How one of the two parameters, or an optimiser state of its shape, lies in a checkpoint."""

    def __init__(self, experts: GroupedExperts, sharded_offsets: tuple[Any, ...], gated: bool):
        self.count, self.gated = experts.num_local_experts, gated
        self.offsets, self.axes = sharded_offsets, len(sharded_offsets)
        self.width = experts.config.hidden_size
        self.expert_place = _place(experts.ep_group)
        self.rank, self.size = _place(experts.tp_group)

    @torch.no_grad()
    def cut(self, key, tensor, replica_id, flattened_range):
        """Return the gate's and the up projection's pieces, or the down projection's."""
        if self.gated:
            halves = tensor.view(self.count, self.width, -1).transpose(1, 2).chunk(2, 1)
            fragments = [i * self.size + self.rank for i in range(2)]
            return [
                self._piece(key, half, replica_id, (self.axes + 1, fragment, 2 * self.size))
                for half, fragment in zip(halves, fragments, strict=True)
            ]
        down = tensor.view(self.count, -1, self.width).transpose(1, 2)
        return self._piece(key, down, replica_id, (self.axes + 2, self.rank, self.size))

    def _piece(self, key, tensor, replica_id, cut) -> ShardedTensor:
        return ShardedTensor.from_rank_offsets(
            key,
            tensor.contiguous(),
            *self.offsets,
            (self.axes, *self.expert_place),
            cut,
            replica_id=replica_id,
            prepend_axis_num=self.axes,
        )

    @torch.no_grad()
    def join(self, pieces):
        """Return the parameter of the tensors that `cut` returned, loaded."""
        whole = torch.cat(pieces, 1) if self.gated else pieces
        shape = (self.width, -1) if self.gated else (-1, self.width)
        return whole.transpose(1, 2).reshape(shape)


def _place(group: torch.distributed.ProcessGroup) -> tuple[int, int]:
    """Return this process's rank in a group and the group's size."""
    return group.rank(), group.size()


def _expect_no_extra_states(module, incompatible_keys) -> None:
    """Let a checkpoint bring empty states of the experts that this module does not have."""
    keys = incompatible_keys.unexpected_keys
    keys[:] = [key for key in keys if _EXTRA_STATE not in key]
