"""One launch from recipe to scheduler: folder, roles shown, scripts, and the job's exit code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from iwopd_megatron.config.cluster import Cluster
from iwopd_megatron.config.recipe import Recipe
from iwopd_megatron.errors import UserError
from iwopd_megatron.launch.launch import make_job, new_folder, write_job
from iwopd_megatron.launch.profile import Profile
from iwopd_megatron.launch.rendezvous import Rendezvous, newest_attempt
from iwopd_megatron.launch.roles import Job


def submit(
    recipe: Recipe, profile: Profile, dryrun: bool, first: Callable[[], None] | None = None
) -> int:
    """Print a recipe's roles and submit them as one job; with `dryrun`, write its scripts only.

    first: is called when all else is well and nothing is written yet. Returns the job's exit code
    where the executor stays until it ends, else 0.
    """
    folder = new_folder(recipe)
    job = make_job(recipe, profile, folder)
    print_roles(job, recipe, profile, dryrun)
    from iwopd_megatron.launch import nemo

    places = nemo.executors(job, profile, folder)
    if first is not None:
        first()
    write_job(job, recipe, folder)
    name = nemo.launch(job, places, profile, folder, dryrun)
    print(f"written to {folder}" if dryrun else f"job {name} launched from {folder}")
    for script in sorted(folder.glob("experiments/**/*.sh")):
        print(f"  {script}")
    return _exit_code(folder) if profile.is_waiting and not dryrun else 0


def _exit_code(folder: Path) -> int:
    """Return what the last attempt of a job that is over ended with."""
    attempt = newest_attempt(folder)
    code = None if attempt is None else Rendezvous(folder, attempt).finished
    if code is None:
        raise UserError(f"the job ended before any role said how; see the logs in {folder}.")
    return code


def verdict(recipe: Recipe, profile: Profile) -> str:
    """Return what the planner says of the recipe on the profile's GPUs, as one sentence."""
    from iwopd_megatron.plan.hardware import GIB
    from iwopd_megatron.plan.plan import plan

    site = {"gpu": profile.gpu, "gpus_per_node": profile.gpus_per_node}
    cluster = (recipe.cluster or Cluster(trainer=recipe.world)).model_copy(update=site)
    found = plan(recipe.model_copy(update={"cluster": cluster}))
    tightest = min(found.roles, key=lambda role: role.margin)
    if not found.fits:
        worst = next(role for role in found.roles if not role.fits)
        return f"does not fit {profile.gpu}: {worst.name} needs more memory; {worst.knob}."
    return (
        f"fits {profile.gpu} with {tightest.margin / GIB:.1f} GiB to spare ({tightest.name}); "
        f"{found.seconds:,.0f} s a round, {found.tokens_per_second:,.0f} tokens/s/GPU, "
        f"{found.gpu_hours:,.0f} GPU-hours in all."
    )


def print_roles(job: Job, recipe: Recipe, profile: Profile, with_commands: bool) -> None:
    """Print roles, nodes and GPUs, and what the planner says of a recipe with a cluster section.

    with_commands: also every role's command and environment.
    """
    console = Console(highlight=False)
    unit = "GPUs" if job.has_gpus else "processes"
    table = Table("role", "nodes", f"{unit} a node", "processes", "restarts")
    for role in job.roles:
        restarts = str(role.max_restarts or f"{job.requeues} (requeued)")
        sizes = map(str, (role.nodes, role.gpus_per_node, role.processes))
        table.add_row(role.name, *sizes, restarts)
    console.print(table)
    cluster = recipe.cluster
    if cluster is not None and job.has_gpus and cluster.gpu != profile.gpu:
        print(f"note: the recipe was laid out for {cluster.gpu}, the profile has {profile.gpu}.")
    if cluster is not None and job.has_gpus and recipe.is_distilling:
        print(f"plan: {verdict(recipe, profile)}")
    if with_commands:
        for role in job.roles:
            console.print(f"[bold]{role.name}[/bold]: {' '.join(role.command)}", soft_wrap=True)
            env = " ".join(f"{name}={value}" for name, value in sorted(role.env.items()))
            console.print(f"  with {env}", soft_wrap=True)
