"""Token weights: time over tokens, context-parallel sizes and rules, against the head's time.

Packed responses of 4,096 tokens; a context-parallel rank holds its zigzag shard of each, and
exchanges a few sums. All ranks share two cores, so the table's cost is the time of all ranks
together per token. The head (bench/loss.py's shape) is timed on 2,048 tokens and scaled.
"""

import json
import os
import statistics
import time

os.environ["OMP_NUM_THREADS"] = "1"

import torch
import torch.distributed as dist
from loss import forward_backward, inputs, ours

from iwopd_megatron.loss.weighting import token_weights_packed
from iwopd_megatron.runtime.local_world import local_context, start_local
from iwopd_megatron.runtime.parallel import zigzag_index

LENGTH, REPEATS = 4096, 9
TOKENS, RANKS = (16384, 65536, 262144), (1, 2, 4)


def seconds(function, *args, **kwargs):
    start = time.perf_counter()
    function(*args, **kwargs)
    return time.perf_counter() - start


def measure(ranks, queue):
    dist.init_process_group("gloo")
    group = dist.group.WORLD if ranks > 1 else None
    for tokens in TOKENS:
        lengths = [LENGTH] * (tokens // LENGTH)
        index = zigzag_index(lengths, ranks, dist.get_rank())
        gap = torch.randn(tokens, generator=torch.Generator().manual_seed(0))[index]
        segments = torch.arange(len(lengths)).repeat_interleave(LENGTH)[index]
        mask = torch.ones(len(index), dtype=torch.bool)
        for rule in ("iw", "iw_signed"):
            times = []
            for _ in range(REPEATS):
                dist.barrier()
                times.append(
                    seconds(
                        token_weights_packed,
                        gap,
                        segments,
                        mask,
                        rule=rule,
                        cp_group=group,
                        num_segments=len(lengths),
                    )
                )
            if dist.get_rank() == 0:
                queue.put((tokens, rule, statistics.median(times)))
    dist.destroy_process_group()


def run(ranks):
    queue = local_context().SimpleQueue()
    context = start_local(ranks, measure, (ranks, queue))
    while not context.join():
        pass
    return [queue.get() for _ in range(2 * len(TOKENS))]


def main():
    torch.set_num_threads(1)
    rows = [(ranks, *row) for ranks in RANKS for row in run(ranks)]
    data = inputs()
    head = statistics.median(seconds(forward_backward, ours, *data) for _ in range(3))
    per_token = head / len(data[2])
    print(f"head: {1e6 * per_token:.0f} us a token, forward + backward")
    print("| context ranks | tokens | rule | ms | ns a token and core | share of the head's time |")
    print("| --- | --- | --- | --- | --- | --- |")
    for ranks, tokens, rule, value in rows:
        cost = value * min(ranks, os.cpu_count()) / tokens
        print(
            f"| {ranks} | {tokens:,} | {rule} | {1e3 * value:.1f} | {1e9 * cost:.0f} "
            f"| {cost / per_token:.2%} |"
        )
    largest = {row[:3]: row[3] for row in rows}
    value = largest[1, max(TOKENS), "iw"]
    print(
        json.dumps(
            {
                "share_of_head": round(value / max(TOKENS) / per_token, 5),
                "time_per_token_16_times_the_tokens": round(
                    value / largest[1, min(TOKENS), "iw"] * min(TOKENS) / max(TOKENS), 2
                ),
            }
        )
    )


if __name__ == "__main__":
    main()
