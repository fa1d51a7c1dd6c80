"""How much a rank says to others, over which axis, and how long that takes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

from iwopd_megatron.plan.plan import Plan
from iwopd_megatron.rehearsal.collectives import Call
from iwopd_megatron.rehearsal.rank import RankRun

# Megatron's names of its groups, by the axis or axes that they run along.
AXES = {
    "TENSOR_MODEL_PARALLEL_GROUP": "tp",
    "CONTEXT_PARALLEL_GROUP": "cp",
    "DATA_PARALLEL_GROUP": "dp",
    "DATA_PARALLEL_GROUP_WITH_CP": "dp x cp",
    "PIPELINE_MODEL_PARALLEL_GROUP": "pp",
    "EMBEDDING_GROUP": "embedding",
    "MODEL_PARALLEL_GROUP": "tp x pp",
    "EXPERT_MODEL_PARALLEL_GROUP": "ep",
    "EXPERT_TENSOR_PARALLEL_GROUP": "etp",
    "EXPERT_TENSOR_AND_MODEL_PARALLEL_GROUP": "etp x ep",
    "EXPERT_DATA_PARALLEL_GROUP": "expert dp",
    "INTRA_DISTRIBUTED_OPTIMIZER_INSTANCE_GROUP": "optimizer",
    "default_pg": "world",
}


def volumes(run: RankRun) -> dict[tuple[str, str], tuple[float, float]]:
    """Return calls and bytes by (phase, operation and axis)."""
    found: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0, 0])
    for phase, calls in run.calls.items():
        for call in calls:
            entry = found[phase, f"{AXES.get(call.axis, call.axis)} {call.operation}"]
            entry[0] += 1
            entry[1] += call.nbytes
    return {key: (count, size) for key, (count, size) in found.items()}


def moved(call: Call) -> float:
    """Return the bytes that a rank sends of a call (plan/traffic.py); of a receive none."""
    n = len(call.ranks)
    factor = {
        "all_reduce": 2 * (n - 1) / n,
        "all_gather": n - 1,
        "reduce_scatter": (n - 1) / n,
        "all_to_all": (n - 1) / n,
        "send": 1,
        "broadcast": 1,
    }.get(call.operation, 0)
    return call.nbytes * factor


# Phases of one optimiser step, and the planner's names of the axes whose bytes it has.
STEP = ("forward/backward", "step")
PLANNED = {"ep": "ep", "tp": "tp", "cp": "cp", "pp": "pp", "world": "pp", "dp x cp": "dp",
           "dp": "dp", "expert dp": "expert dp"}  # fmt: skip


def by_axis(run: RankRun, phases: tuple[str, ...]) -> dict[str, float]:
    """Return the bytes that a rank moves over each axis in these phases."""
    found: dict[str, float] = defaultdict(float)
    for phase in phases:
        for call in run.calls.get(phase, []):
            axis = AXES.get(call.axis, call.axis)
            if axis == "world" and call.operation != "send":  # a number or two
                continue
            found[PLANNED.get(axis, axis)] += moved(call)
    return dict(found)


def communication(plan: Plan) -> Callable[[list[Call]], float]:
    """Return what gives the seconds of calls at the cluster's link rates.

    Bytes move by NVLink where all ranks of a call are on a node, else by one adapter a GPU.
    """
    gpu, rates, node = plan.setup.gpu, plan.setup.rates, plan.setup.cluster.gpus_per_node

    def seconds(calls: list[Call]) -> float:
        total = 0.0
        for call in calls:
            ends = call.ranks if call.peer is None else (call.peer, *call.ranks[:1])
            inside = len({rank // node for rank in ends}) == 1
            total += moved(call) / ((gpu.nvlink if inside else gpu.network) * rates.link)
        return total

    return seconds
