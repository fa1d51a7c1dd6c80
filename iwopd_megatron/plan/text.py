"""A plan as tables and sentences in the terminal, or as JSON."""

from __future__ import annotations

import shlex
from dataclasses import replace
from itertools import groupby
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from iwopd_megatron.config.models import Layout
from iwopd_megatron.config.preflight import describe
from iwopd_megatron.config.stages import layers_of_stages
from iwopd_megatron.plan.hardware import GIB
from iwopd_megatron.plan.plan import Plan
from iwopd_megatron.plan.roles import PlannedRole
from iwopd_megatron.plan.setup import Setup
from iwopd_megatron.plan.teachers import shares_are_given


def as_json(plan: Plan) -> dict[str, Any]:
    """Return all figures of a plan for JSON: bytes, seconds, tokens a second and GPU."""
    setup = plan.setup
    return {
        "fits": plan.fits,
        "gpu": setup.cluster.gpu,
        "gpus": plan.gpus,
        "roles": {
            role.name: {
                "gpus": role.gpus,
                "layout": role.layout,
                "memory": {name: size for name, size in role.parts.items() if size},
                "total": role.memory.total,
                "capacity": role.capacity,
                "margin": role.margin,
                "fits": role.fits,
                "knob": role.knob,
            }
            for role in plan.roles
        },
        **({"teachers": _teachers(plan)} if len(setup.teachers) > 1 else {}),
        "assumed": list(setup.said),
        "student": describe(setup.layout),
        **({"stages": stages} if (stages := _uneven_stages(setup)) else {}),
        "recompute": setup.recipe.student.recompute,
        "round": {
            "seconds": plan.seconds,
            "phases": [vars(phase) for phase in plan.phases],
            "generation_tail": plan.generation.tail,
            "mean_response": setup.lengths.mean,
            "requests_per_server": setup.prompts / setup.servers,
            "concurrency": plan.concurrency,
        },
        "tokens_per_second_per_gpu": plan.tokens_per_second,
        "gpu_hours": plan.gpu_hours,
        "another_node": plan.another_node(),
        "limits": plan.limits(),
    }


def _teachers(plan: Plan) -> dict[str, Any]:
    return {
        teacher.key: {
            "hf": str(teacher.model.hf),
            "layout": describe(teacher.layout),
            "gpus": teacher.gpus,
            "share": teacher.share,
            "share_is_assumed": not shares_are_given(plan.setup.recipe),
        }
        for teacher in plan.setup.teachers
    }


def print_plan(plan: Plan) -> None:
    """Print tables of roles and phases, and what follows from them."""
    console, setup = Console(soft_wrap=True), plan.setup
    table = Table(title=f"GiB on the busiest {setup.cluster.gpu} of each role, {plan.gpus} GPUs")
    table.add_column("")
    for role in plan.roles:
        table.add_column(f"{role.name}: {role.gpus}\n{role.layout}", justify="right")
    for name in dict.fromkeys(name for role in plan.roles for name in role.parts):
        sizes = [role.parts.get(name, 0) for role in plan.roles]
        if any(sizes):
            cells = [f"{size / GIB:.1f}" if size else "" for size in sizes]
            table.add_row(name.replace("_", " "), *cells)
    table.add_row("total, reserved", *(f"{role.memory.total / GIB:.1f}" for role in plan.roles))
    table.add_row("a GPU has", *(f"{role.capacity / GIB:.1f}" for role in plan.roles))
    table.add_row("verdict", *("fits" if role.fits else "too much" for role in plan.roles))
    console.print(table)
    table = Table(title=f"a round of {setup.prompts} prompts: {plan.seconds:.0f} s")
    for column in ("phase", "role", "starts", "seconds", "of the round"):
        table.add_column(column, justify="right" if column not in ("phase", "role") else "left")
    for phase in plan.phases:
        share = "hidden" if phase.is_hidden else f"{phase.seconds / plan.seconds:.0%}"
        begin, seconds = f"{phase.start:.1f}", f"{phase.seconds:.1f}"
        table.add_row(phase.name, phase.role, begin, seconds, share)
    console.print(table)
    for line in notes(plan):
        console.print(line, highlight=False)


def notes(plan: Plan) -> list[str]:
    """Return what the tables do not say, a sentence each."""
    setup = plan.setup
    lines = [
        f"{role.name} does not fit by {-role.margin / GIB:.1f} GiB a GPU: {role.knob}"
        for role in plan.roles
        if not role.fits
    ]
    lines += [_stages_line(*item) for item in _uneven_stages(setup).items()]
    lines += setup.said
    tail = f", {plan.generation.tail:.0%} of generation with less than a quarter of them left"
    lines.append(
        f"responses: {setup.lengths.mean:.0f} tokens on average (assumed)"
        + tail * setup.recipe.is_distilling
    )
    if len(setup.teachers) > 1:
        parts = ", ".join(f"{teacher.key} {teacher.share:.0%}" for teacher in setup.teachers)
        given = shares_are_given(setup.recipe)
        why = "as data.train mixes them" if given else "assumed: data.train does not say"
        lines.append(f"scored responses, all sources of one length: {parts} ({why})")
    if needed := imbalance(plan):
        parts = ", ".join(
            f"{role.name} {more / GIB:+.1f} GiB{'' if role.margin >= more else ', too much'}"
            for role, more in needed
        )
        lines.append(f"a rank whose experts get twice the tokens planned would need: {parts}")
    if setup.cluster.rollout:
        lines.append(
            f"servers: {setup.prompts / setup.servers:.0f} requests each, "
            f"room for {plan.concurrency:.0f} at once"
        )
    lines.append(
        f"{plan.tokens_per_second:.0f} tokens/s/GPU, {plan.gpu_hours:.0f} GPU-hours for "
        f"{setup.recipe.train.rounds} rounds"
    )
    for role, seconds in sorted(plan.another_node().items(), key=lambda item: item[1]):
        if seconds < plan.seconds:
            gain = plan.seconds / seconds - 1
            price = setup.cluster.gpus_per_node / plan.gpus
            lines.append(f"another node for the {role}: {gain:+.1%} rounds, {price:+.1%} GPUs")
    return (
        lines
        + [f"breaks first: {sentence}" for sentence in plan.limits()[:1]]
        + [f"then: {sentence}" for sentence in plan.limits()[1:]]
    )


def imbalance(plan: Plan) -> list[tuple[PlannedRole, float]]:
    """Return roles and the bytes that a rank with twice the planned tokens of experts needs more.

    Roles without expert parallelism, which has such ranks, are left out.
    """
    assumed = replace(plan.setup.assumed, hot=2 * plan.setup.assumed.hot)
    twice = Plan(replace(plan.setup, assumed=assumed)).roles
    found = [
        (role, more.memory.total - role.memory.total)
        for role, more in zip(plan.roles, twice, strict=True)
    ]
    return [(role, more) for role, more in found if more > 0]


def _uneven_stages(setup: Setup) -> dict[str, list[int]]:
    """Return the layers of every stage, of models whose stages have settings of their own."""
    models = [("student", setup.layout, setup.student)]
    models += [(x.key, x.layout, x.size) for x in setup.teachers if x.key in setup.services]
    return {
        name: layers_of_stages(layout, size.layers)
        for name, layout, size in models
        if layout.placement
    }


def _stages_line(name: str, stages: list[int]) -> str:
    runs = [(len(list(run)), layers) for layers, run in groupby(stages)]
    said = ", ".join(f"{n} x {layers}" if n > 1 else f"{layers}" for n, layers in runs)
    return f"{name}: stages of {said} layers"


def print_proposals(plans: list[Plan], top: int = 5) -> None:
    """Print a table of `search`'s best, then the overrides that make each, a line to copy."""
    console = Console(soft_wrap=True)
    table = Table(title="proposals, fastest round first")
    for column in ("", "round s", "trainer", "teacher", "rollout", "recompute", "fullest"):
        table.add_column(column)
    for number, plan in enumerate(plans[:top], 1):
        roles = {role.name: f"{role.gpus}: {role.layout}" for role in plan.roles}
        fullest = max(role.memory.total / role.capacity for role in plan.roles)
        roles["teacher"] = ", ".join(
            roles[key] if key == "teacher" else f"{key} {roles[key]}" for key in plan.setup.services
        )
        cells = [roles.get(name) or "-" for name in ("trainer", "teacher", "rollout")]
        recompute = plan.setup.recipe.student.recompute
        table.add_row(str(number), f"{plan.seconds:.0f}", *cells, recompute, f"{fullest:.0%}")
    console.print(table)
    for number, plan in enumerate(plans[:top], 1):
        console.print(f"{number}: {' '.join(overrides(plan))}", highlight=False)


def overrides(plan: Plan) -> list[str]:
    """Return key=value of everything that a proposal may have changed."""
    recipe, cluster = plan.setup.recipe, plan.setup.cluster
    found = [
        f"cluster.{role}={getattr(cluster, role)}" for role in ("trainer", "teacher", "rollout")
    ]
    found.append(f"student.parallel={_flow(recipe.student.parallel)}")
    found.append(f"student.recompute={recipe.student.recompute}")
    for key, service in recipe.services.items():
        found.append(f"{key}.service.parallel={_flow(service.parallel)}")
        found.append(f"{key}.service.processes={service.processes}")
    if cluster.rollout:
        servers = recipe.rollout.servers
        found += [f"rollout.servers.tp={servers.tp}", f"rollout.servers.start={servers.start}"]
    return found


def _flow(layout: Layout) -> str:
    """Return what a layout has but defaults as a YAML flow mapping, quoted for a shell."""
    given = layout.model_dump(exclude_defaults=True)
    flow = yaml.safe_dump(given, default_flow_style=True, sort_keys=False, width=10**6)
    return shlex.quote(flow.strip())
