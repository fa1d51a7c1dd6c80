"""From a recipe and a cluster profile to roles: processes, nodes, commands. Submits nothing.

Imports neither torch nor NeMo-Run, so what cannot run is refused on a login node.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path

import yaml

from iwopd_megatron.config.models import Layout
from iwopd_megatron.config.preflight import check_service_sizes
from iwopd_megatron.config.recipe import Recipe
from iwopd_megatron.errors import RecipeError
from iwopd_megatron.launch.profile import Profile
from iwopd_megatron.launch.roles import TRAINER, Job, Role
from iwopd_megatron.launch.tuning import variables

RECIPE = "recipe.yaml"  # of the launch folder: the recipe as it was launched


def new_folder(recipe: Recipe) -> Path:
    """Return RUN/launch/NAME_TIME, for all that the launch and its job write; not yet made."""
    name = "".join(c if c.isalnum() else "-" for c in recipe.out.name).strip("-") or "run"
    started = time.strftime("%Y%m%d-%H%M%S")
    return (recipe.out / "launch" / f"{name}_{started}").absolute()


def newest_folder(run: Path) -> Path:
    """Return the folder of a run's last launch; RecipeError where it was never launched."""
    found = sorted((run / "launch").glob("*/job.json"))
    if not found:
        raise RecipeError(f"{run} was not launched: it has no launch/; use 'iwopd launch'.")
    return max((file.parent for file in found), key=lambda folder: folder.name)


def make_job(recipe: Recipe, profile: Profile, folder: Path) -> Job:
    """Return the roles of a recipe on a site.

    folder: the launch folder, whose snapshot of the recipe every role reads. RecipeError where a
    role does not divide evenly over nodes, or needs more machines than the executor has.
    """
    program = [profile.python, "-m", "iwopd_megatron"]
    snapshot = str(folder / RECIPE)
    command = [*program, "train" if recipe.is_distilling else "sft", snapshot, "--resume"]
    roles = [_role(profile, TRAINER, recipe.world, 1, recipe.student.parallel, command)]
    check_service_sizes(recipe)
    for key, processes in recipe.service_processes.items():
        roles.append(_teacher(recipe, profile, program, snapshot, key, processes))
    if recipe.rollout.engine != "hf" and not recipe.rollout.servers.urls:
        roles.append(_rollout(recipe, profile, [*program, "serve-rollout", snapshot]))
    job = Job(str(Path.cwd()), roles, profile.gpus_per_node, profile.requeues, profile.has_gpus)
    if profile.is_waiting and job.machines > 1:
        raise RecipeError(
            f"the roles need {job.machines} machines of {profile.gpus_per_node} GPUs and executor "
            f"{profile.executor} has this one; choose a smaller layout, or a cluster."
        )
    return job


def write_job(job: Job, recipe: Recipe, folder: Path) -> None:
    """Make the launch folder and write job.json and the recipe with its overrides."""
    job.write(folder)
    text = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)
    (folder / RECIPE).write_text(text)


def _teacher(
    recipe: Recipe, profile: Profile, program: list[str], snapshot: str, key: str, world: int
) -> Role:
    service, source = recipe.services[key], key.partition(".")[2]
    command = [*program, "serve-teacher", snapshot, f"{key}.service.processes={world}"]
    command += ["--host", "0.0.0.0", "--port", "{port}", *(["--source", source] if source else [])]
    name = key.replace("teachers.", "teacher-")
    role = _role(profile, name, world, 1, service.parallel, command)
    ready = min(service.start_timeout_s, profile.ready_timeout_s)
    return replace(role, urls_key=f"{key}.urls", ready_timeout_s=ready)


def _rollout(recipe: Recipe, profile: Profile, command: list[str]) -> Role:
    servers, cluster = recipe.rollout.servers, recipe.cluster
    count = servers.start
    if cluster is not None and cluster.rollout:
        count = cluster.rollout // servers.tp
    if count == 0:
        raise RecipeError(
            f"rollout.engine={recipe.rollout.engine} has no servers; write rollout.servers.start=N "
            "or cluster.rollout=GPUS to launch them, or rollout.servers.urls of running ones."
        )
    command = [*command, "--host", "0.0.0.0", "--port", "{port}"]
    role = _role(profile, "rollout", count, servers.tp, None, command)
    return replace(
        role,
        is_world=False,
        urls_key="rollout.servers.urls",
        ready_timeout_s=min(servers.ready_timeout_s, profile.ready_timeout_s),
        hang_timeout_s=servers.hang_timeout_s,
    )


def _role(
    profile: Profile,
    name: str,
    processes: int,
    gpus_each: int,
    layout: Layout | None,
    command: list[str],
) -> Role:
    """Return a role on whole nodes where it needs several. `layout`: None for rollout servers."""
    room = profile.gpus_per_node // gpus_each
    if room == 0:
        raise RecipeError(
            f"a {name} server takes {gpus_each} GPUs but nodes have {profile.gpus_per_node}; "
            "lower rollout.servers.tp."
        )
    if processes > room and processes % room:
        fits = math.floor(processes / room) * room
        raise RecipeError(
            f"{name}: {processes} processes of {gpus_each} GPUs do not fill whole nodes of "
            f"{profile.gpus_per_node}; use {fits} or {fits + room}."
        )
    return Role(
        name=name,
        processes=processes,
        per_node=min(processes, room),
        gpus_each=gpus_each,
        command=command,
        env=variables(profile.gpu, layout) | profile.env,
        max_restarts=0 if name == TRAINER else profile.restarts,
        ready_timeout_s=profile.ready_timeout_s,
    )
