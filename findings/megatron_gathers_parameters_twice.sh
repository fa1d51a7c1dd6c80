#!/usr/bin/env bash
# megatron-core 0.16.1 and 0.19.2 gather a mixture-of-experts model's parameters twice a step.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
"${PYTHON:-python3.12}" -m venv "$place/venv"
pip() { "$place/venv/bin/pip" install --quiet --disable-pip-version-check "$@"; }
cat > "$place/show.py" <<'PY'
import collections
import os
import socket
import sys

import megatron.core
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    param_and_grad_buffer,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer import TransformerConfig
from torch.overrides import TorchFunctionMode

STEPS = 2


class WithoutGpu(TorchFunctionMode):
    """Makes on the CPU what Megatron asks of a GPU, and gives tensors the types that it expects."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs["device"] = "cpu"
        result = func(*args, **kwargs)
        is_asked = func is torch.Tensor.type and len(args) == 1
        return result.replace("torch.", "torch.cuda.", 1) if is_asked else result


def build(experts):
    """Return Megatron's DDP and distributed optimizer of a model, expert-parallel if it has any."""
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(expert_model_parallel_size=2 if experts else 1)
    moe = dict(num_moe_experts=experts, moe_router_topk=2, expert_model_parallel_size=2)
    config = TransformerConfig(
        num_layers=1, hidden_size=8, num_attention_heads=2, ffn_hidden_size=8,
        moe_token_dispatcher_type="allgather", add_bias_linear=False, use_cpu_initialization=True,
        **(moe if experts else {}),
    )  # fmt: skip
    spec = get_gpt_layer_local_spec(num_experts=experts, moe_grouped_gemm=False)
    model = GPTModel(config, spec, vocab_size=16, max_sequence_length=16)
    ddp = DistributedDataParallelConfig(
        use_distributed_optimizer=True, overlap_param_gather=False, overlap_grad_reduce=False
    )
    wrapped = DistributedDataParallel(config, ddp, model)
    given = OptimizerConfig(optimizer="adam", lr=0.1, use_distributed_optimizer=True, clip_grad=0.0)
    return wrapped, get_megatron_optimizer(given, [wrapped])


def show(rank, port, queue):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.cuda.current_device = lambda: "cpu"
    WithoutGpu().__enter__()
    dist.init_process_group("gloo", rank=rank, world_size=2)
    gather, seen = param_and_grad_buffer.dist_all_gather_func, []

    def counted(output, given, group, **more):
        seen.append((group.group_desc, dist.get_process_group_ranks(group), output.nbytes))
        return gather(output, given, group=group, **more)

    param_and_grad_buffer.dist_all_gather_func = counted
    for experts in (None, 4):
        wrapped, optimizer = build(experts)
        parts = len(getattr(optimizer, "chained_optimizers", [optimizer]))
        for step in range(1, STEPS + 1):
            for parameter in wrapped.parameters():
                parameter.main_grad.fill_(1.0)
            seen.clear()
            optimizer.step()
            if rank == 0:
                queue.put((experts or 0, parts, step, [*seen]))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    queue = mp.get_context("spawn").SimpleQueue()
    mp.spawn(show, (port, queue), nprocs=2)
    print(f"megatron-core {megatron.core.__version__}")
    print(
        "without overlap_param_gather every optimizer of the chain gathers all parameters after a "
        "step: of a model with experts, which have one of their own, each is gathered twice."
    )
    counts = {0: set(), 4: set()}
    for _ in range(2 * STEPS):
        experts, parts, step, seen = queue.get()
        print(f"{experts or 'no'} experts, {parts} optimizer(s), step {step}, rank 0:")
        for (group, ranks, nbytes), times in collections.Counter(
            (group, tuple(ranks), nbytes) for group, ranks, nbytes in seen
        ).items():
            print(f"  {times} x all_gather of {nbytes} bytes over {group} {list(ranks)}")
            counts[experts].add(times)
    sys.exit(0 if counts == {0: {1}, 4: {2}} else 1)
PY
for version in 0.16.1 0.19.2; do
    pip torch==2.13.0 numpy==2.4.6 megatron-core==$version
    CUDA_VISIBLE_DEVICES="" "$place/venv/bin/python" -W ignore "$place/show.py"
done
