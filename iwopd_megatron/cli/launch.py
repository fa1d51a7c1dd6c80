"""`iwopd launch | status | attach | serve-rollout`: a recipe on a cluster, through NeMo-Run."""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from iwopd_megatron.config.load import load_recipe, read_recipe
from iwopd_megatron.data.before_start import check_before_launch
from iwopd_megatron.errors import RecipeError
from iwopd_megatron.files.outputs import check_folder
from iwopd_megatron.launch.launch import newest_folder
from iwopd_megatron.launch.profile import load_profile
from iwopd_megatron.launch.rehearsed import rehearse
from iwopd_megatron.launch.submit import submit
from iwopd_megatron.plan import host_check
from iwopd_megatron.records.resume import check_start
from iwopd_megatron.runtime.host import available

Run = Annotated[Path, typer.Argument(help="run folder, a recipe's 'out'")]


def launch(
    recipe: Annotated[Path, typer.Argument(help="recipe YAML")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value")] = None,
    cluster: Annotated[
        str, typer.Option(help="profile: a YAML file, or a name in cluster/profiles")
    ] = "local",
    dryrun: Annotated[
        bool, typer.Option("--dryrun", help="write the scripts and show the roles; submit nothing")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="go on with the run folder's newest checkpoint")
    ] = False,
    rehearsal: Annotated[
        bool,
        typer.Option(
            "--rehearsal/--no-rehearsal",
            help="on GPUs: first `rehearse --full --short`",
        ),
    ] = True,
) -> None:
    """Run trainer, teachers and rollout servers as one job of a cluster.

    Roles find each other through files in RUN/launch and run in this folder, so it and RUN must be
    ones that all nodes share, as must the recipe's models and data. The trainer starts once every
    service's /health is 200. A service that dies is started again; a job that crashes, or saves
    before its time limit, is requeued and resumes. Secrets (HF_TOKEN, WANDB_API_KEY): export them
    in the shell that launches. executor local and docker stay until the job ends.
    """
    profile, loaded = load_profile(cluster), read_recipe(recipe, overrides or [])
    if dryrun and not loaded.student.hf.is_dir():
        print(f"note: {loaded.student.hf} is not on this machine; models and data are unchecked.")
    else:
        loaded = load_recipe(recipe, overrides or [])
        for note in check_before_launch(loaded):
            print(f"note: {note}")
    check_folder(loaded.out, "out")
    check_start(loaded, resume)
    if profile.is_waiting and not profile.has_gpus and not dryrun:
        host_check.check(loaded, available())
    is_rehearsed = rehearsal and profile.has_gpus and not dryrun and not resume
    first = partial(rehearse, recipe, overrides or [], loaded, profile) if is_rehearsed else None
    code = submit(loaded, profile, dryrun, first)
    if not dryrun and profile.is_waiting:
        sys.exit(code)
    if not dryrun:
        print(f"follow it with: iwopd status {loaded.out}, iwopd attach {loaded.out}")


def status(
    run: Run,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON line")] = False,
) -> None:
    """Show roles, round, tokens/s, the last checkpoint, and how long a run has said nothing."""
    from iwopd_megatron.launch.status import print_status, run_status

    folder = newest_folder(run) if (run / "launch").is_dir() else None
    found = run_status(run, folder)
    if as_json:
        print(json.dumps(found))
    else:
        print_status(found)


def attach(run: Run) -> None:
    """Follow the output of all roles of a run's last launch until it ends, over its requeues."""
    from iwopd_megatron.launch.log import follow

    for line in follow(newest_folder(run)):
        print(line, flush=True)


def serve_rollout(
    recipe: Annotated[Path, typer.Argument(help="recipe YAML")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value")] = None,
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 30000,
) -> None:
    """Become one of the recipe's rollout servers."""
    loaded = load_recipe(recipe, overrides or [])
    if loaded.rollout.engine == "hf":
        raise RecipeError(f"{recipe}: rollout.engine=hf is embedded; write sglang or vllm.")
    from iwopd_megatron.rollout.make import server_command, server_environment

    python = str(loaded.rollout.servers.python or sys.executable)
    command = [python, *server_command(loaded, port, host)]
    sys.stdout.flush()
    os.execvpe(python, command, server_environment(loaded))
