#!/usr/bin/env bash
# megatron-core 0.19.2 refits expert-parallel ranks with other ranks' experts (SequentialMLP).
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
"${PYTHON:-python3.12}" -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 megatron-core==0.19.2
cat > "$place/show.py" <<'PY'
import os
import socket
import sys

import megatron.core
import torch.distributed as dist
import torch.multiprocessing as mp
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.resharding import build_local_reshard_plan
from megatron.core.transformer import TransformerConfig

EXPERTS = 4


def build(ep):
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(expert_model_parallel_size=ep)
    config = TransformerConfig(
        num_layers=1, hidden_size=8, num_attention_heads=2, ffn_hidden_size=8,
        num_moe_experts=EXPERTS, moe_router_topk=2, moe_token_dispatcher_type="allgather",
        add_bias_linear=False, expert_model_parallel_size=ep, use_cpu_initialization=True,
    )  # fmt: skip
    spec = get_gpt_layer_local_spec(num_experts=EXPERTS, moe_grouped_gemm=False)
    return GPTModel(config, spec, vocab_size=16, max_sequence_length=16)


def show(rank, port, queue):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    source, target = build(ep=1), build(ep=2)  # the source has all experts on each rank
    plan = build_local_reshard_plan(source, target, num_experts=EXPERTS)
    sent = {op.task_id: op.param_name for op in plan.send_ops}  # by this rank, which has all
    own = target.decoder.layers[0].mlp.local_expert_indices
    for op in plan.recv_ops:
        if op.param_name.endswith("linear_fc1.weight") and op.peer_rank == rank:
            number = int(op.param_name.split("local_experts.")[1].split(".")[0])
            given = int(sent[op.task_id].split("local_experts.")[1].split(".")[0])
            queue.put((rank, own[number], given))
    dist.destroy_process_group()


if __name__ == "__main__":
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    queue = mp.get_context("spawn").SimpleQueue()
    mp.spawn(show, (port, queue), nprocs=2)
    print(f"megatron-core {megatron.core.__version__}")
    print(
        "refit plans the experts of SequentialMLP by their local numbers, so with expert parallelism on "
        "the receiving side a rank is filled with other experts' weights, without an error."
    )
    pairs = sorted(queue.get() for _ in range(EXPERTS))
    for rank, wanted, given in pairs:
        print(f"rank {rank}: expert {wanted} is filled from expert {given}")
    sys.exit(0 if any(wanted != given for _, wanted, given in pairs) else 1)
PY
CUDA_VISIBLE_DEVICES="" "$place/venv/bin/python" -W ignore "$place/show.py"
