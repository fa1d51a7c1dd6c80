"""The planner against a rehearsal, for every recipe: memory of each role, a round, and findings.

    python bench/rehearse.py [--short | --memory] [RECIPE ...] [key=value ...]

One table row for every role: bytes of tensors planned and rehearsed, with an expert rank that gets
two and four times its share, seconds of a round both ways, what the rehearsal took. key=value: the
recipe's with other values; --memory: bytes alone. Exits with 1 where anything was found.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

warnings.filterwarnings("ignore")

from iwopd_megatron.config.load import read_recipe  # noqa: E402
from iwopd_megatron.rehearsal import full  # noqa: E402
from iwopd_megatron.rehearsal.job import jobs  # noqa: E402
from iwopd_megatron.rehearsal.report import GIB  # noqa: E402
from iwopd_megatron.rehearsal.role import RoleRehearsal  # noqa: E402
from iwopd_megatron.runtime.quiet import quiet  # noqa: E402

RECIPES = Path(__file__).parents[1] / "recipes"


def row(recipe: Path, overrides: list[str], short: bool) -> int:
    """Rehearse one recipe; print its rows and findings; return how many were found."""
    found = full.rehearse(read_recipe(recipe, overrides), short=short)
    for role in found.roles:
        hot = " / ".join(f"{size / GIB:.1f}" for size in role.hot.values()) or "-"
        first = role is found.roles[0]
        last = f"{found.plan.seconds:.0f} / {found.round_seconds:.0f}" if first else ""
        took = f"{found.seconds:.0f}" if first else ""
        print(
            f"| {recipe.stem if first else ''} | {role.role}, {role.world} "
            f"| {role.planned / GIB:.2f} | {role.peak / GIB:.2f} "
            f"| {role.peak / role.planned - 1:+.1%} | {hot} | {last} | {took} |",
            flush=True,
        )
    for finding in found.findings:
        print(f"finding: {recipe.name}: {finding}", flush=True)
    return len(found.findings)


def memory(recipe: Path, overrides: list[str]) -> int:
    """Rehearse bytes alone; print a recipe's rows and findings; return how many were found."""
    plan, found = jobs(read_recipe(recipe, overrides))
    reports = [RoleRehearsal(job, plan, False, True).run_memory() for job in found]
    for role in reports:
        difference = role.peak / role.planned - 1
        print(
            f"| {recipe.stem} | {role.role}, {role.world} | {role.planned / GIB:.2f} "
            f"| {role.peak / GIB:.2f} | {difference:+.1%} |",
            flush=True,
        )
        for finding in role.findings:
            print(f"finding: {recipe.name}: {finding}", flush=True)
    return sum(len(role.findings) for role in reports)


def main() -> None:
    """Rehearse the recipes that are named, or all."""
    quiet()
    short = "--short" in sys.argv
    given = [one for one in sys.argv[1:] if not one.startswith("--")]
    overrides = [one for one in given if "=" in one]
    recipes = [Path(one) for one in given if "=" not in one] or sorted(RECIPES.glob("*.yaml"))
    if "--memory" in sys.argv:
        sys.exit(sum(memory(recipe, overrides) for recipe in recipes) > 0)
    if len(recipes) > 1:
        names = "recipe", "role, ranks", "planned GiB", "rehearsed", "", "x2 / x4", "round s", "s"
        print(f"| {' | '.join(names)} |\n|{' --- |' * len(names)}")
    count = sum(row(recipe, overrides, short) for recipe in recipes)
    sys.exit(count > 0)


if __name__ == "__main__":
    main()
