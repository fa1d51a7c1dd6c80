#!/usr/bin/env bash
# megatron-core 0.19.2 refits only the first model chunk of an interleaved pipeline.
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
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.resharding.copy_services.base import CopyService
from megatron.core.resharding.refit import swap_model_weights
from megatron.core.transformer import TransformerConfig



def build():
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(1, 2, 2)
    config = TransformerConfig(
        num_layers=4, hidden_size=8, num_attention_heads=2, ffn_hidden_size=8,
        pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2,
        pipeline_dtype=torch.float32, add_bias_linear=False, use_cpu_initialization=True,
    )  # fmt: skip
    chunks = []
    for stage in range(2):
        first = parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage)
        last = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage)
        chunks.append(
            GPTModel(
                config, get_gpt_layer_local_spec(), vocab_size=16, max_sequence_length=16,
                pre_process=first, post_process=last, vp_stage=stage,
                share_embeddings_and_output_weights=False,
            )  # fmt: skip
        )
    return chunks


class Messages(CopyService):
    """Copies over gloo, without CUDA's streams."""

    def __init__(self):
        super().__init__()
        self.sends, self.receives = [], []

    def submit_send(self, tensor, rank, task_id=None):
        self.sends.append((tensor, rank, task_id))

    def submit_recv(self, tensor, rank, task_id=None):
        self.receives.append((tensor, rank, task_id))

    def run(self):
        own = {task: tensor for tensor, rank, task in self.sends if rank == self.rank}
        for tensor, _, task in self.receives:
            tensor.copy_(own[task])  # same layout on both sides: all are local


def show(rank, port, queue):
    torch.cuda.synchronize = lambda: None  # called even where there is no GPU
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    source, target = build(), build()
    for chunk in target:
        for parameter in chunk.parameters():
            parameter.data.fill_(-7.0)
    with torch.no_grad():
        swap_model_weights(source, target, Messages())
    for number, (one, other) in enumerate(zip(source, target)):
        pairs = list(zip(one.parameters(), other.parameters()))
        queue.put((rank, number, sum(torch.equal(a, b) for a, b in pairs), len(pairs)))
    dist.destroy_process_group()


if __name__ == "__main__":
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    queue = mp.get_context("spawn").SimpleQueue()
    mp.spawn(show, (port, queue), nprocs=2)
    print(f"megatron-core {megatron.core.__version__}")
    print(
        "swap_model_weights takes the list of an interleaved pipeline's model chunks and moves only the "
        "first one's weights, without an error."
    )
    found = sorted(queue.get() for _ in range(4))
    for rank, number, moved, total in found:
        print(f"rank {rank}, chunk {number}: {moved} of {total} parameters have arrived")
    sys.exit(0 if any(moved < total for _, number, moved, total in found if number) else 1)
PY
CUDA_VISIBLE_DEVICES="" "$place/venv/bin/python" -W ignore "$place/show.py"
