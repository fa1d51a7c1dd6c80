"""The `iwopd` command. Heavy imports wait until a recipe has been accepted."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from iwopd_megatron.cli import compare as cli_compare
from iwopd_megatron.cli import convert as cli_convert
from iwopd_megatron.cli import data as cli_data
from iwopd_megatron.cli import eval as cli_eval
from iwopd_megatron.cli import grade as cli_grade
from iwopd_megatron.cli import launch as cli_launch
from iwopd_megatron.cli import plan as cli_plan
from iwopd_megatron.cli import rehearse as cli_rehearse
from iwopd_megatron.cli import report as cli_report
from iwopd_megatron.cli import serve as cli_serve
from iwopd_megatron.cli.group import Commands, leave
from iwopd_megatron.config import doctor  # fmt: skip
from iwopd_megatron.config.load import load_recipe
from iwopd_megatron.config.models import Layout
from iwopd_megatron.config.preflight import check_layout
from iwopd_megatron.config.recipe import Recipe
from iwopd_megatron.data.before_start import check_before_start
from iwopd_megatron.data.prompts import load_tokenizer
from iwopd_megatron.data.training_set import load_training_set
from iwopd_megatron.errors import RecipeError, UserError
from iwopd_megatron.files.lock import locked
from iwopd_megatron.files.outputs import check_folder
from iwopd_megatron.hf.answer_end import check_answer_end
from iwopd_megatron.hf.config import read_hf_config
from iwopd_megatron.hf.folder import check_weights
from iwopd_megatron.records.disk import disk_told
from iwopd_megatron.records.resume import check_start
from iwopd_megatron.runtime.quiet import quiet

RecipePath = Annotated[Path, typer.Argument(help="recipe YAML")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key=value, e.g. train.lr=3e-4")]
NOT_THERE = (
    errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ELOOP,
)  # fmt: skip
Degree = Annotated[int, typer.Option(min=1, max=2**20)]
Resume = Annotated[
    bool, typer.Option("--resume", help="go on from the newest checkpoint of the run folder")
]


def train(recipe: RecipePath, overrides: Overrides = None, resume: Resume = False) -> None:
    """Distil a student on-policy from a teacher."""
    loaded = load_recipe(recipe, overrides or [])
    if not loaded.is_distilling:
        raise RecipeError(
            f"{recipe} has no teacher; "
            "add teacher.hf, or use 'iwopd sft' to fine-tune on responses."
        )
    _train(loaded, resume)


def sft(recipe: RecipePath, overrides: Overrides = None, resume: Resume = False) -> None:
    """Fine-tune a model on given responses, through the same trainer."""
    loaded = load_recipe(recipe, overrides or [])
    if loaded.is_distilling:
        raise RecipeError(
            f"{recipe} has a teacher; use 'iwopd train', or remove the teacher section."
        )
    _train(loaded, resume)


def _train(recipe: Recipe, resume: bool) -> None:
    if _is_main():
        check_folder(recipe.out, "out")
        if recipe.rollout.sync_folder is not None:
            check_folder(recipe.rollout.sync_folder, "rollout.sync_folder")
    check_start(recipe, resume)
    (data,) = check_before_start([recipe])
    with _alone_in([recipe.out]):
        worker = _workers()
        sys.exit(worker.execute(recipe.world, worker.train, (recipe, resume, data)))


def _is_main() -> bool:
    """Whether this process is the only one, or torchrun's rank 0."""
    return os.environ.get("RANK", "0") == "0"


@contextlib.contextmanager
def _alone_in(folders: list[Path]) -> Iterator[None]:
    """Two runs never write into one folder. Under torchrun rank 0 sees to it."""
    with contextlib.ExitStack() as stack:
        for folder in folders if _is_main() else []:
            stack.enter_context(locked(folder))
        yield


def examine(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Say what a recipe minimises, and which of its settings do nothing or not what they say."""
    loaded = load_recipe(recipe, overrides or [])
    print(f"objective: {doctor.objective_line(loaded)}.")
    tokenizer = load_tokenizer(loaded.student.hf)
    ends = check_answer_end(loaded.student.hf, tokenizer, is_taught=not loaded.is_distilling)
    found = load_training_set(loaded, tokenizer)
    limit, dropped = loaded.rollout.max_prompt_tokens, found.too_long
    kept = len(found.problems)
    print(f"data: {kept} prompts of at most {limit} tokens, {dropped} longer ones left out.")
    notes = doctor.findings(loaded) + ends + found.notes
    for note in notes + doctor.long_prompts(dropped, kept + dropped, limit):
        print(f"note: {note}")


def toy_task(
    folder: Annotated[Path, typer.Argument(help="where to write")] = Path("runs/toy_task"),
) -> None:
    """Write the demo's task: data, tokenizer and the configurations of its two models."""
    check_folder(folder, "FOLDER")
    from iwopd_megatron.toy_task import write_task

    write_task(folder)
    print(f"wrote {folder}")


def parity(
    folder: Annotated[Path, typer.Argument(help="Hugging Face folder")],
    tp: Degree = 1, pp: Degree = 1, vpp: Degree = 1, ep: Degree = 1, etp: Degree = 1,
    cp: Degree = 1,
    packed: Annotated[
        bool, typer.Option("--packed", help="several sequences of unequal length a micro-batch")
    ] = False,
    bf16: Annotated[
        bool, typer.Option("--bf16", help="compare a bf16 layout with bf16's own error")
    ] = False,
) -> None:  # fmt: skip
    """Compare a layout with Hugging Face on every rank: logits, loss, gradients, optimiser step."""
    if "RANK" in os.environ:
        raise RecipeError("parity starts its own processes; run it without torchrun.")
    layout = Layout(tp=tp, pp=pp, vpp=vpp, ep=ep, etp=etp, cp=cp)
    hf = read_hf_config(folder)
    check_weights(folder, hf)
    check_layout(layout, hf, "parity")
    worker = _workers()
    from iwopd_megatron.parity import hf_reference
    from iwopd_megatron.parity import parity as check
    from iwopd_megatron.runtime.local_world import local_context

    lengths = [24, 16, 32, 20, 28, 12, 24, 32] if packed else [32] * 8
    dtype = "bf16" if bf16 else "fp32"
    samples = hf_reference.make_samples(hf.vocab_size, lengths, hf.pad_token_id)
    reference = hf_reference.compute_reference(folder, samples, bf16)
    queue = local_context().SimpleQueue()
    budget = 96 if packed else 32
    code = worker.execute(
        layout.unit, worker.check_parity, (folder, reference, layout, budget, dtype, queue)
    )
    if code == 0:
        result = queue.get()
        problems = check.failures(result, reference, dtype)
        print(json.dumps(result))
        for problem in problems:
            print(f"error: {problem}", file=sys.stderr)
        code = 1 if problems else 0
    sys.exit(code)


def _workers():
    """The module that imports torch, Megatron and transformers."""
    quiet()
    from iwopd_megatron.cli import worker

    return worker


COMMANDS = {
    "Train": {
        "train": train, "sft": sft, "compare": cli_compare.compare, "eval": cli_eval.evaluate,
    },
    "Look": {
        "report": cli_report.report, "status": cli_launch.status, "attach": cli_launch.attach,
        "prefixes": cli_report.prefixes,
    },
    "Plan and launch": {
        "data": cli_data.data, "doctor": examine, "plan": cli_plan.plan,
        "rehearse": cli_rehearse.rehearse, "launch": cli_launch.launch,
        "serve-teacher": cli_serve.serve_teacher, "serve-rollout": cli_launch.serve_rollout,
    },
    "Models": {
        "convert": cli_convert.convert, "export": cli_convert.export, "check": cli_convert.check,
        "parity": parity, "toy-task": toy_task,
    },
}  # fmt: skip
app = typer.Typer(
    cls=Commands, add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False,
    help="On-policy distillation with discrepancy-weighted tokens on Megatron-Core.",
)  # fmt: skip
for _group, _commands in COMMANDS.items():
    for _name, _command in _commands.items():
        app.command(_name, rich_help_panel=_group)(_command)
app.add_typer(cli_grade.app, name="grade", rich_help_panel="Look")


def main() -> None:
    """Entry point: a user's mistake is one sentence; a wrong recipe exits with 2."""
    try:
        with disk_told(Path("the output"), is_run=False):
            app()
    except UserError as error:
        leave(error)
    except OSError as error:  # of a path in the recipe or on the command line
        if error.errno not in NOT_THERE or error.filename is None:
            raise
        leave(RecipeError(f"{error.filename} cannot be opened: {error.strerror}; name another."))
