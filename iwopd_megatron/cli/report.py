"""`iwopd report | prefixes`: what runs recorded as one page, and one thing they did not record."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from iwopd_megatron.errors import RecipeError
from iwopd_megatron.evaluation.prefix_study import StudyRequest, prepare_study
from iwopd_megatron.files.outputs import check_folder


def report(
    folders: Annotated[list[Path], typer.Argument(help="run folders, or folders of compared runs")],
    out: Annotated[
        Path | None,
        typer.Option(help="folder of report.html; default: the only one, else runs/report"),
    ] = None,
) -> None:
    """Draw report.html of runs or comparisons, several in one page.

    Its table and what was found are printed too, on stderr; stdout is the page's path.
    """
    from iwopd_megatron.report.data import find_runs
    from iwopd_megatron.report.page import write_report
    from iwopd_megatron.report.summary import summarise
    from iwopd_megatron.report.terminal import print_table

    for folder in folders:
        if not folder.is_dir():
            raise RecipeError(f"{folder} is no folder; give a run folder, a recipe's 'out'.")
    place = out or (folders[0] if len(folders) == 1 else Path("runs/report"))
    check_folder(place, "--out")
    page = write_report(folders, place)
    print_table(summarise(find_runs(folders)), sys.stderr)
    print(page)


def prefixes(
    run: Annotated[Path, typer.Argument(help="run folder, a recipe's 'out'")],
    at: Annotated[
        str, typer.Option(help="shares of the student's answers that are kept")
    ] = "0,0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9",
    problems: Annotated[int, typer.Option(min=1, help="first problems of data.eval")] = 64,
    samples: Annotated[int, typer.Option(min=1, help="continuations of each prefix")] = 8,
    trained: Annotated[
        bool, typer.Option("--trained", help="the run's final student; default: its first one")
    ] = False,
    engine: Annotated[
        str | None, typer.Option(help="hf, vllm or sglang; default: the recipe's")
    ] = None,
    processes: Annotated[
        int, typer.Option(min=1, help="with engine hf, each holds a whole model")
    ] = 1,
) -> None:
    """Teacher's and student's chance of a right answer from student prefixes of growing length.

    Servers are started for the student, then for the teacher. RUN/prefixes.json has the figures,
    which 'iwopd report RUN' draws.
    """
    request = StudyRequest(run, at, problems, samples, trained, engine, processes)
    study, notes = prepare_study(request)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    from iwopd_megatron.cli import worker

    code = worker.execute(processes, worker.continue_prefixes, (study,))
    if code == 0:
        print(run / "prefixes.json")
    sys.exit(code)
