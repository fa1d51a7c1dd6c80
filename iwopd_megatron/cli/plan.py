"""`iwopd plan`: does a recipe fit, how long is a round, what does it cost, what breaks first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from iwopd_megatron.config.cluster import Cluster
from iwopd_megatron.config.load import read_recipe
from iwopd_megatron.errors import RecipeError
from iwopd_megatron.files.outputs import check_file


def plan(
    recipe: Annotated[Path, typer.Argument(help="recipe YAML")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value")] = None,
    gpus: Annotated[
        int | None, typer.Option(min=1, help="plan for so many GPUs, roles in the best split")
    ] = None,
    gpu: Annotated[
        str | None, typer.Option(help="h100-80 | h200 | b200 | h20 | a100, instead of the recipe's")
    ] = None,
    search: Annotated[
        bool, typer.Option("--search", help="also propose layouts and splits, best first")
    ] = False,
    mean_response: Annotated[
        float | None, typer.Option(min=1, help="tokens; default: 0.3 of max_response_tokens")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print figures as one JSON line")] = False,
    picture: Annotated[
        Path | None, typer.Option(help="draw memory and timeline into FILE.png or FILE.html")
    ] = None,
) -> None:
    """Plan a recipe's memory, time and cost. Needs no GPU, no weights and no torch.

    Exit code 1 where it does not fit.
    """
    from iwopd_megatron.plan import search as plan_search
    from iwopd_megatron.plan import text as plan_report
    from iwopd_megatron.plan.plan import plan as make_plan
    from iwopd_megatron.plan.setup import Assumptions

    if picture is not None and picture.suffix not in (".png", ".html"):
        raise RecipeError(f"--picture {picture} is neither .png nor .html; name it like one.")
    if picture is not None:
        check_file(picture, "--picture")
    loaded = read_recipe(recipe, overrides or [])
    if gpu is not None:
        _check_gpu(gpu)
        cluster = loaded.cluster or Cluster(trainer=loaded.world)
        loaded = loaded.model_copy(update={"cluster": cluster.model_copy(update={"gpu": gpu})})
    found = make_plan(loaded, Assumptions(mean_response=mean_response))
    proposals = []
    if gpus is not None and gpus != found.gpus:
        proposals = plan_search.search(found, gpus, layouts=False)
        if not proposals:
            raise RecipeError(
                f"{recipe}: its layouts cannot share {gpus} GPUs; add --search for other layouts, "
                f"or another number."
            )
        found = proposals[0]
    if search:
        proposals = plan_search.search(found)
    if as_json:
        figures = plan_report.as_json(found)
        if search:
            figures["proposals"] = [
                {"seconds": p.seconds, "overrides": plan_report.overrides(p)} for p in proposals[:5]
            ]
        print(json.dumps(figures))
    else:
        plan_report.print_plan(found)
        if search:
            plan_report.print_proposals(proposals)
    if picture is not None:
        from iwopd_megatron.plan.picture import write_picture

        write_picture(found, picture)
    raise typer.Exit(0 if found.fits else 1)


def _check_gpu(name: str) -> None:
    known = Cluster.model_fields["gpu"].annotation.__args__
    if name not in known:
        raise RecipeError(f"--gpu {name} is not known; choose one of {', '.join(known)}.")
