"""The table of supported versions, from what was run: `make support LOG=what TESTED_LOG named`.

Takes recorded runs into iwopd_megatron/runtime/tested.json, a run of the same suite with the same
versions in the place of the one before, and writes the tables of README.md and docs/support.md.
"""

import json
import re
import sys
from collections import defaultdict
from pathlib import Path

from iwopd_megatron.runtime import versions
from iwopd_megatron.runtime.versions import NAMES, SERVERS, Run, Support

ROOT = Path(__file__).parents[1]
MARKS = "<!-- support: made by `make support` -->", "<!-- support ends -->"


def merge(runs: list[Run], new: list[Run]) -> list[Run]:
    """Return recorded runs; parts of one new run (a file each) count together."""
    parts = defaultdict(list)
    for run in new:
        parts[_identity(run)].append(run)
    kept = {_identity(run): run for run in runs}
    for identity, group in parts.items():
        counts = {k: sum(run[k] for run in group) for k in ("passed", "failed")}
        kept[identity] = group[0] | counts
    return [kept[identity] for identity in sorted(kept)]


def _identity(run: Run) -> str:
    return json.dumps([run["suite"], run["machine"], run["versions"]])


def readme_table(runs: list[Run]) -> str:
    """Return a row a package: versions tested, asked for, refused."""
    lines = ["| | tested | expected to work | refused |", "| --- | --- | --- | --- |"]
    for distribution in NAMES:
        support = Support.of(distribution, runs)
        wanted = ", ".join(
            f"`{part}`" for part in sorted(map(str, versions.required(distribution)))
        )
        refused = "not asked" if distribution in SERVERS else "others"
        tested = ", ".join(support.tested) or "-"
        if support.broken:
            tested += f" (tests failed with {', '.join(support.broken)})"
        lines.append(f"| {support.name} | {tested} | {wanted} | {refused} |")
    return "\n".join(lines)


def runs_table(runs: list[Run]) -> str:
    """Return a row a recorded run."""
    lines = [f"| suite | machine | {' | '.join(NAMES.values())} | passed | failed |"]
    lines.append("| --- " * (len(NAMES) + 4) + "|")
    for run in runs:
        cells = [run["versions"].get(name, "-") for name in NAMES]
        cells = [run["suite"], run["machine"], *cells, run["passed"], run["failed"]]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def with_table(text: str, table: str) -> str:
    """Return a page with another table between its MARKS."""
    pattern = re.compile(f"(?<={re.escape(MARKS[0])}\n).*?(?={re.escape(MARKS[1])})", re.DOTALL)
    return pattern.sub(lambda _: f"\n{table}\n\n", text)


def pages(runs: list[Run]) -> dict[Path, str]:
    """Return the pages that have a table, with the tables of `runs`."""
    made = {"README.md": readme_table(runs), "docs/support.md": runs_table(runs)}
    return {ROOT / name: with_table((ROOT / name).read_text(), t) for name, t in made.items()}


def main() -> None:
    """Read the log that is named, write tested.json and the pages."""
    new = [json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]
    runs = merge(versions.tested_runs(), new)
    versions.TESTED.write_text("[\n" + ",\n".join(f"  {json.dumps(run)}" for run in runs) + "\n]\n")
    for page, text in pages(runs).items():
        page.write_text(text)


if __name__ == "__main__":
    main()
