"""How evenly packing spreads a round over data-parallel ranks, by tokens and by cost.

1,024 responses with a long tail (log-normal, cut at 16,384 tokens), prompts of 300, a budget of
20,480 tokens a micro-batch; a sequence of L tokens costs L + a L^2 with Qwen3-30B-A3B's a. Ranks
wait for each other at every micro-batch under expert parallelism, at the step's end without it:
waiting is the share of all ranks' time that is spent so.
"""

import json
import time

import numpy

from iwopd_megatron.batch.packing import plan_microbatches
from iwopd_megatron.hf.flops import attention_cost
from iwopd_megatron.hf.known_models import known_model

BUDGET = 20480


def waiting(plan, costs):
    """Shares of time lost at every micro-batch, and at the end of the step only."""
    cost = numpy.array([[sum(costs[i] for i in batch) for batch in rank] for rank in plan])
    each = 1 - cost.sum() / (len(cost) * cost.max(0).sum())
    return each, 1 - cost.sum() / (len(cost) * cost.sum(1).max())


def in_order(lengths, dp):
    """Sequences as they come, ranks in turn, a new micro-batch when the budget is full."""
    plan = [[[]] for _ in range(dp)]
    for i, _ in enumerate(lengths):
        rank = plan[i % dp]
        if sum(lengths[j] for j in rank[-1]) + lengths[i] > BUDGET:
            rank.append([])
        rank[-1].append(i)
    count = max(map(len, plan))
    return [rank + [[]] * (count - len(rank)) for rank in plan]


def main():
    random = numpy.random.default_rng(0)
    lengths = numpy.minimum(random.lognormal(8.3, 0.8, 1024), 16384).astype(int) + 300
    lengths, a = lengths.tolist(), attention_cost(known_model("Qwen3-30B-A3B"))
    costs = [length + a * length**2 for length in lengths]
    print(
        f"{len(lengths)} sequences, {sum(lengths):,} tokens, longest {max(lengths):,}; a = {a:.2g}"
    )
    print("| dp | packing | micro-batches | waiting, every micro-batch | waiting, step end | ms |")
    print("| --- | --- | --- | --- | --- | --- |")
    result = {}
    for dp in (8, 32):
        plans = {
            "in order": lambda dp=dp: in_order(lengths, dp),
            "balanced by tokens": lambda dp=dp: plan_microbatches(lengths, BUDGET, dp, 1),
            "balanced by cost": lambda dp=dp: plan_microbatches(lengths, BUDGET, dp, 1, a),
        }
        for name, make in plans.items():
            start = time.perf_counter()
            plan = make()
            ms = 1e3 * (time.perf_counter() - start)
            each, end = waiting(plan, costs)
            print(f"| {dp} | {name} | {len(plan[0])} | {each:.1%} | {end:.1%} | {ms:.1f} |")
            result[f"dp{dp}, {name}"] = round(float(each), 4)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
