"""What each process of a world runs, and how the command line starts a world on this machine.

It knows every job, and so imports most rooms, with torch, Megatron and transformers: a job must be
a function of a module, which spawned processes import again, and errors of every room have their
exit codes in one place. Commands import it only when a recipe has been accepted.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import signal
import sys
from collections.abc import Callable
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any

from torch.multiprocessing import ProcessContext, ProcessExitedException, ProcessRaisedException

from iwopd_megatron.config import doctor
from iwopd_megatron.config.models import Layout
from iwopd_megatron.config.recipe import Recipe
from iwopd_megatron.data.run_data import RunData
from iwopd_megatron.errors import (
    EXIT_STOPPED,
    CheckpointError,
    DiskError,
    GateError,
    RecipeError,
    ServiceError,
    UserError,
)
from iwopd_megatron.evaluation.continuations import PrefixStudy, study_prefixes
from iwopd_megatron.evaluation.progress import BenchProgress
from iwopd_megatron.evaluation.run_benchmarks import BenchRun, run_benchmarks
from iwopd_megatron.models.passed_on import check_settings
from iwopd_megatron.parity import parity
from iwopd_megatron.parity.hf_reference import Reference
from iwopd_megatron.plan import host_check
from iwopd_megatron.records.disk import disk_told
from iwopd_megatron.records.wandb_log import check_installed
from iwopd_megatron.runtime import device
from iwopd_megatron.runtime.host import available
from iwopd_megatron.runtime.local_world import MOST_LOCAL, start_local
from iwopd_megatron.runtime.parallel import Parallel, initialise, shutdown
from iwopd_megatron.runtime.stop import die_with_parent, watch_signals
from iwopd_megatron.train.compare import Arm, is_finished
from iwopd_megatron.train.progress import Progress
from iwopd_megatron.train.trainer import Trainer

EXIT_CODES = {
    error.__name__: error.exit_code
    for error in (RecipeError, GateError, ServiceError, DiskError, CheckpointError, UserError)
}


def check_memory(recipes: list[Recipe]) -> None:
    """Refuse runs that this machine's memory would not do, where it has no GPU; RecipeError.

    Under torchrun the first process of each machine looks.
    """
    if device.has_gpu() or os.environ.get("LOCAL_RANK", "0") != "0":
        return
    there, here = available(), os.environ.get("LOCAL_WORLD_SIZE")
    for recipe in recipes:
        processes = int(here) if here else recipe.world
        if processes <= MOST_LOCAL:  # more are refused for their number
            host_check.check(recipe, there, processes)


def train(recipe: Recipe, resume: bool, data: RunData) -> None:
    """Run one run on this rank; exits with EXIT_STOPPED if it was stopped and saved."""
    run_arms([Arm(recipe.out.name, recipe.train.seed, recipe, data)], resume)


def run_arms(arms: list[Arm], resume: bool) -> None:
    """Run one arm after the other on this rank; with `resume`, finished ones are skipped.

    Exits with EXIT_STOPPED if one was stopped and saved.
    """
    watch_signals()
    die_with_parent()
    check_installed(arms[0].recipe)
    for arm in arms:
        check_settings(arm.recipe.student)
    parallel = initialise(arms[0].recipe.student.parallel, arms[0].recipe.train.seed)
    with Progress(sum(arm.recipe.train.rounds for arm in arms), parallel.is_main) as progress:
        for note in dict.fromkeys(note for arm in arms for note in doctor.findings(arm.recipe)):
            progress.say(f"note: {note}")
        for arm in arms:
            name = f"{arm.name} seed {arm.seed}"
            if resume and is_finished(arm):
                progress.start(name, arm.recipe.train.rounds)
                progress.say(f"{name} is already finished in {arm.recipe.out}")
                continue
            stopped_after = _run_arm(arm, name, parallel, progress, resume)
            if stopped_after is not None:
                progress.say(
                    f"stopped after round {stopped_after}; "
                    f"saved in {arm.recipe.out}, go on with --resume"
                )
                shutdown()
                sys.exit(EXIT_STOPPED)
    shutdown()


def _run_arm(
    arm: Arm, name: str, parallel: Parallel, progress: Progress, resume: bool
) -> int | None:
    """Run one arm, whose models are gone then; return the round it was stopped after, if it was."""
    with disk_told(arm.recipe.out):
        trainer = Trainer(arm.recipe, parallel, progress, resume, arm.data)
        progress.start(name, trainer.round)
        return None if trainer.run() else trainer.round


def evaluate(run: BenchRun) -> None:
    """Answer and grade the benchmarks of `iwopd eval` in this process."""
    die_with_parent()
    parallel = initialise(Layout(), run.seed)
    with disk_told(run.out, is_run=False), BenchProgress() as progress:
        results = run_benchmarks(run, parallel, progress)
    progress.table(results)
    shutdown()


def continue_prefixes(study: PrefixStudy) -> None:
    """Run the study of `iwopd prefixes` on this rank."""
    die_with_parent()
    parallel = initialise(Layout())
    with disk_told(study.out, is_run=False):
        study_prefixes(study, parallel, Progress(0, parallel.is_main).say)
    shutdown()


def check_parity(
    folder: Path,
    reference: Reference,
    layout: Layout,
    budget: int,
    dtype: str,
    queue: SimpleQueue[dict[str, float]],
    recompute: str = "none",
) -> None:
    """Compare one layout with the reference on this rank; rank 0 puts the figures into `queue`."""
    result = parity.compare(folder, reference, layout, budget, dtype, recompute)
    if os.environ["RANK"] == "0":
        queue.put(result)
    shutdown()


def execute(world: int, function: Callable[..., Any], args: tuple[Any, ...]) -> int:
    """Run `function(*args)` on every process of the world and return the exit code of the command.

    Under torchrun (RANK is set) this process is one rank; otherwise `world` local ones are started.
    """
    if "RANK" in os.environ:
        given = int(os.environ["WORLD_SIZE"])
        if given != world:
            raise RecipeError(
                f"torchrun started {given} processes, the recipe needs {world}; use that number."
            )
        function(*args)
        return 0
    context = start_local(world, function, args)
    pids = context.pids()
    handlers = {
        n: signal.signal(n, lambda *_: _forward(pids)) for n in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        while not context.join():
            pass
    except ProcessRaisedException as error:
        return _explain(str(error), _other_reports(context))
    except ProcessExitedException as error:
        return error.exit_code if error.exit_code > 0 else 128 - error.exit_code
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return 0


def _forward(pids: list[int]) -> None:
    """Send SIGTERM to the processes of a world that are still there."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)


def _other_reports(context: ProcessContext) -> list[str]:
    """Return the tracebacks of all processes that raised.

    The first one to be heard may only have lost the connection to another.
    """
    files = [Path(file) for file in context.error_files]
    return [pickle.loads(file.read_bytes()) for file in files if file.is_file()]


def _explain(report: str, others: list[str]) -> int:
    """Print why a world ended and return the exit code.

    A user's mistake is one sentence; anything else keeps its traceback.
    """
    for text in (report, *others):
        match = re.match(r"(?:[\w.]*\.)?(\w+): (.*)", text.strip().splitlines()[-1])
        if match and match[1] in EXIT_CODES:
            print(f"error: {match[2]}", file=sys.stderr)
            return EXIT_CODES[match[1]]
    print(report, file=sys.stderr)
    return 1
