"""`iwopd compare`: arms x seeds of a recipe, on this machine or as jobs of a cluster."""

from __future__ import annotations

import contextlib
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from iwopd_megatron.data.before_start import check_before_launch, check_before_start
from iwopd_megatron.errors import RecipeError
from iwopd_megatron.files.lock import locked
from iwopd_megatron.files.outputs import check_folder
from iwopd_megatron.launch.launch import make_job, new_folder
from iwopd_megatron.launch.profile import load_profile
from iwopd_megatron.launch.submit import submit
from iwopd_megatron.records.resume import check_resume, has_begun
from iwopd_megatron.runtime.quiet import quiet

if TYPE_CHECKING:
    from iwopd_megatron.train.compare import Arm


def compare(
    recipe: Annotated[Path, typer.Argument(help="recipe YAML")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, e.g. train.lr=3e-4")
    ] = None,
    vary: Annotated[
        str, typer.Option(help="KEY=VALUE,VALUE: one arm a value")
    ] = "loss.weighting.rule=uniform,iw",
    seeds: Annotated[int, typer.Option(min=1, help="runs an arm")] = 2,
    out: Annotated[
        Path, typer.Option(help="folder for all runs, summary.json and report.html")
    ] = Path("runs/compare"),
    resume: Annotated[
        bool, typer.Option("--resume", help="go on from the newest checkpoint of each run folder")
    ] = False,
    cluster: Annotated[
        str | None,
        typer.Option(help="profile, as for 'iwopd launch': a job for each arm and seed"),
    ] = None,
    dryrun: Annotated[
        bool, typer.Option("--dryrun", help="with --cluster: write the scripts, submit nothing")
    ] = False,
) -> None:
    """Run several arms from the same start, with the same data and seeds, and compare them."""
    from iwopd_megatron.train.compare import plan_arms

    if dryrun and cluster is None:
        raise RecipeError("--dryrun is for jobs; name their cluster with --cluster PROFILE.")
    arms = plan_arms(recipe, overrides or [], vary, seeds, out)
    _check_start(arms, out, resume)
    if cluster is None:
        sys.exit(_run(_with_data(arms, resume), out, resume))
    sys.exit(_submit(arms, out, cluster, dryrun))


def _check_start(arms: list[Arm], out: Path, resume: bool) -> None:
    """Raise RecipeError where the comparison cannot start, or not go on, in this folder.

    Of a comparison that is resumed, some arms may not have begun.
    """
    if os.environ.get("RANK", "0") == "0":
        check_folder(out, "--out")
    if not resume and any((arm.recipe.out / "metrics.jsonl").exists() for arm in arms):
        raise RecipeError(
            f"{out} already holds runs; add --resume, or choose another folder with --out."
        )
    if resume and not any(has_begun(arm.recipe.out) for arm in arms):
        raise RecipeError(
            f"--resume: no run of this comparison was started in {out}; leave --resume out to "
            "start it, or name its folder with --out."
        )
    for arm in arms if resume else []:
        check_resume(arm.recipe)


def _with_data(arms: list[Arm], resume: bool) -> list[Arm]:
    """Return the arms; those that are still to be run have their data, which was checked."""
    from iwopd_megatron.train.compare import is_finished

    todo = [arm for arm in arms if not (resume and is_finished(arm))]
    found = dict(zip(map(id, todo), check_before_start([a.recipe for a in todo]), strict=True))
    return [replace(arm, data=found.get(id(arm))) for arm in arms]


def _run(arms: list[Arm], out: Path, resume: bool) -> int:
    """Run arm after arm in one world, then write summary.json and report.html; the exit code."""
    quiet()
    from iwopd_megatron.cli import worker

    is_main = os.environ.get("RANK", "0") == "0"  # under torchrun every rank is here
    worker.check_memory([arm.recipe for arm in arms if arm.data is not None])
    with contextlib.ExitStack() as stack:
        for arm in arms if is_main else []:
            stack.enter_context(locked(arm.recipe.out))
        code = worker.execute(arms[0].recipe.world, worker.run_arms, (arms, resume))
    if code == 0 and is_main:
        from iwopd_megatron.report.data import find_runs
        from iwopd_megatron.report.page import write_report
        from iwopd_megatron.report.summary import summarise, write_summary
        from iwopd_megatron.report.terminal import print_table

        summary = summarise(find_runs([out]))
        write_summary(out, summary)
        print_table(summary)
        print(f"{out / 'summary.json'}\n{write_report(out)}")
    return code


def _submit(arms: list[Arm], out: Path, cluster: str, dryrun: bool) -> int:
    """Submit a job for each run that has not ended; none if one of them could not run."""
    from iwopd_megatron.train.compare import is_finished

    profile = load_profile(cluster)
    open_arms = [arm for arm in arms if not is_finished(arm)]
    for arm in open_arms:
        for note in check_before_launch(arm.recipe):
            print(f"note: {note}")
        make_job(arm.recipe, profile, new_folder(arm.recipe))
    for arm in open_arms:
        print(f"{arm.name} seed {arm.seed}:")
        code = submit(arm.recipe, profile, dryrun)
        if code:
            return code
    print(f"when the jobs have ended: iwopd report {out}")
    return 0
