"""The planner against a rehearsal, for every recipe: memory of each role, a round, and findings.

    python bench/rehearse.py [--short | --memory] [--jobs N] [RECIPE ...] [key=value ...]

One table row for every role: bytes of tensors planned and rehearsed, with an expert rank that gets
two and four times its share, seconds of a round both ways, what the rehearsal took. key=value: the
recipe's with other values; --memory: bytes alone; --jobs: recipes at a time. Each recipe has a
process of its own, forked from one that has imported Megatron-Core. Exits with 1 where anything was
found.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import warnings
from functools import partial
from pathlib import Path

warnings.filterwarnings("ignore")

from iwopd_megatron.config.load import read_recipe  # noqa: E402
from iwopd_megatron.rehearsal import full  # noqa: E402
from iwopd_megatron.rehearsal.job import jobs  # noqa: E402
from iwopd_megatron.rehearsal.report import GIB  # noqa: E402
from iwopd_megatron.rehearsal.role import RoleRehearsal  # noqa: E402
from iwopd_megatron.runtime.quiet import quiet  # noqa: E402

RECIPES = Path(__file__).parents[1] / "recipes"


def rounds(recipe: Path, overrides: list[str], short: bool) -> tuple[list[str], list[str]]:
    """Rehearse one recipe; return its rows and findings."""
    found = full.rehearse(read_recipe(recipe, overrides), short=short)
    rows = []
    for role in found.roles:
        hot = " / ".join(f"{size / GIB:.1f}" for size in role.hot.values()) or "-"
        first = role is found.roles[0]
        last = f"{found.plan.seconds:.0f} / {found.round_seconds:.0f}" if first else ""
        took = f"{found.seconds:.0f}" if first else ""
        rows.append(
            f"| {recipe.stem if first else ''} | {role.role}, {role.world} "
            f"| {role.planned / GIB:.2f} | {role.peak / GIB:.2f} "
            f"| {role.peak / role.planned - 1:+.1%} | {hot} | {last} | {took} |"
        )
    return rows, [str(finding) for finding in found.findings]


def memory(recipe: Path, overrides: list[str]) -> tuple[list[str], list[str]]:
    """Rehearse bytes alone; return a recipe's rows and findings."""
    plan, found = jobs(read_recipe(recipe, overrides))
    reports = [RoleRehearsal(job, plan, False, True).run_memory() for job in found]
    rows = [
        f"| {recipe.stem} | {role.role}, {role.world} | {role.planned / GIB:.2f} "
        f"| {role.peak / GIB:.2f} | {role.peak / role.planned - 1:+.1%} |"
        for role in reports
    ]
    return rows, [str(finding) for role in reports for finding in role.findings]


def main() -> None:
    """Rehearse the recipes that are named, or all."""
    quiet()
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("given", nargs="*", metavar="RECIPE | key=value")
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--jobs", type=int, default=1)
    asked = parser.parse_args()
    overrides = [one for one in asked.given if "=" in one]
    recipes = [Path(one) for one in asked.given if "=" not in one] or sorted(RECIPES.glob("*.yaml"))
    measure = partial(memory if asked.memory else rounds, overrides=overrides)
    if not asked.memory:
        measure = partial(measure, short=asked.short)
        names = "recipe", "role, ranks", "planned GiB", "rehearsed", "", "x2 / x4", "round s", "s"
        print(f"| {' | '.join(names)} |\n|{' --- |' * len(names)}")
    count = 0
    # a pool's later workers are forked by a thread, where the stand-ins' function mode is not
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(["iwopd_megatron.rehearsal.full"])
    with forks.Pool(asked.jobs, quiet, maxtasksperchild=1) as pool:
        for recipe, (rows, findings) in zip(recipes, pool.imap(measure, recipes), strict=True):
            print("\n".join(rows), flush=True)
            for finding in findings:
                print(f"finding: {recipe.name}: {finding}", flush=True)
            count += len(findings)
    sys.exit(count > 0)


if __name__ == "__main__":
    main()
