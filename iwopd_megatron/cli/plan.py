"""`iwopd plan`: does a recipe fit, how long is a round, what does it cost, what breaks first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from iwopd_megatron.config.cluster import Cluster
from iwopd_megatron.config.load import read_recipe
from iwopd_megatron.config.recipe import Recipe
from iwopd_megatron.errors import RecipeError
from iwopd_megatron.files.outputs import check_file

if TYPE_CHECKING:
    from iwopd_megatron.plan.plan import Plan


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
    if picture is not None:
        _check_picture(picture)
    from iwopd_megatron.plan import search as plan_search
    from iwopd_megatron.plan.plan import plan as make_plan
    from iwopd_megatron.plan.setup import Assumptions

    loaded = _loaded(recipe, overrides or [], gpu)
    found = make_plan(loaded, Assumptions(mean_response=mean_response))
    if gpus is not None and gpus != found.gpus:
        found = _shared(found, gpus, recipe)
    proposals = plan_search.search(found) if search else None
    _say(found, proposals, as_json)
    if picture is not None:
        from iwopd_megatron.plan.picture import write_picture

        write_picture(found, picture)
    raise typer.Exit(0 if found.fits else 1)


def _check_picture(file: Path) -> None:
    if file.suffix not in (".png", ".html"):
        raise RecipeError(f"--picture {file} is neither .png nor .html; name it like one.")
    check_file(file, "--picture")


def _loaded(recipe: Path, overrides: list[str], gpu: str | None) -> Recipe:
    """Return the recipe on the GPUs that --gpu names."""
    loaded = read_recipe(recipe, overrides)
    if gpu is None:
        return loaded
    known = get_args(Cluster.model_fields["gpu"].annotation)
    if gpu not in known:
        raise RecipeError(f"--gpu {gpu} is not known; choose one of {', '.join(known)}.")
    cluster = loaded.cluster or Cluster(trainer=loaded.world)
    return loaded.model_copy(update={"cluster": cluster.model_copy(update={"gpu": gpu})})


def _shared(found: Plan, gpus: int, recipe: Path) -> Plan:
    """Return the best plan whose roles share so many GPUs in their own layouts."""
    from iwopd_megatron.plan.search import search

    plans = search(found, gpus, layouts=False)
    if not plans:
        raise RecipeError(
            f"{recipe}: its layouts cannot share {gpus} GPUs; add --search for other layouts, "
            f"or another number."
        )
    return plans[0]


def _say(found: Plan, proposals: list[Plan] | None, as_json: bool) -> None:
    """Print a plan and the best of its proposals, where there was a search."""
    from iwopd_megatron.plan import text as plan_text

    if not as_json:
        plan_text.print_plan(found)
        if proposals is not None:
            plan_text.print_proposals(proposals)
        return
    figures = plan_text.as_json(found)
    if proposals is not None:
        figures["proposals"] = [
            {"seconds": p.seconds, "overrides": plan_text.overrides(p)} for p in proposals[:5]
        ]
    print(json.dumps(figures))
