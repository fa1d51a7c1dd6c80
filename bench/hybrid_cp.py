"""Megatron's dynamic context parallelism (`hybrid_context_parallel`) against the project's packing.

Both plan 1,024 responses with a long tail (log-normal) for 32 ranks of at most 20,480 tokens each;
a sequence of L tokens costs L + a L^2 with Qwen3-30B-A3B's a, divided by the ranks that share it.
The project cuts every sequence over the same cp and packs several into a micro-batch; Megatron
gives each the fewest ranks that hold it, one sequence a forward pass, and lets ranks wait for each
other after every group. Waiting is the share of all ranks' time that is spent so, to the step's
end. Nothing is run: Megatron's attention can do the latter only in TransformerEngine.
"""

import json
from types import SimpleNamespace

import numpy
from megatron.core.pipeline_parallel.hybrid_cp_schedule import BalancedCPScheduler
from packing import BUDGET

from iwopd_megatron.batch.packing import plan_microbatches
from iwopd_megatron.hf.flops import attention_cost
from iwopd_megatron.hf.known_models import known_model

RANKS = 32


def ours(lengths, cost, cp, a):
    """Share waited, and forward passes a rank."""
    plan = plan_microbatches(lengths, BUDGET * cp, RANKS // cp, 2 * cp if cp > 1 else 1, a)
    ranks = [sum(cost(lengths[i]) for batch in rank for i in batch) for rank in plan]
    return 1 - sum(ranks) / (len(ranks) * max(ranks)), len(plan[0])


def megatrons(lengths, cost):
    """Share waited, and the most forward passes of a rank."""
    scheduler = BalancedCPScheduler(BUDGET, SimpleNamespace(size=lambda: RANKS))
    samples = sorted(enumerate(lengths), key=lambda pair: -pair[1])
    _, groups = scheduler.get_groups_and_subsamples(samples, None)
    took, passes = 0.0, numpy.zeros(RANKS, int)
    for group in groups:
        shared = {i: sum(i in rank for rank in group) for rank in group for i in rank}
        took += max(sum(cost(lengths[i]) / shared[i] for i in rank) for rank in group)
        passes += [len(rank) for rank in group]
    planned = {i for group in groups for rank in group for i in rank}
    assert planned == set(range(len(lengths)))
    return 1 - sum(map(cost, lengths)) / (RANKS * took), int(passes.max())


def main():
    a = attention_cost(known_model("Qwen3-30B-A3B"))

    def cost(length):
        return length + a * length**2

    print("| longest | plan | waiting | forward passes of a rank |")
    print("| --- | --- | --- | --- |")
    result = {}
    for limit, cp, centre in ((16384, 1, 8.3), (65536, 4, 9.3)):
        random = numpy.random.default_rng(0)
        lengths = numpy.minimum(random.lognormal(centre, 0.8, 1024), limit).astype(int).tolist()
        for name, plan in (
            (f"the project's, cp{cp}", lambda n=lengths, c=cp: ours(n, cost, c, a)),
            ("Megatron's", lambda n=lengths: megatrons(n, cost)),
        ):
            share, passes = plan()
            print(f"| {max(lengths):,} | {name} | {share:.1%} | {passes} |")
            result[f"{limit}, {name}"] = round(float(share), 4)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
