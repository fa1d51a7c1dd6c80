"""A rehearsal as a table in the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from iwopd_megatron.config.preflight import describe
from iwopd_megatron.rehearsal.full import LARGEST, Rehearsal
from iwopd_megatron.rehearsal.push import PUSH
from iwopd_megatron.rehearsal.report import GIB, RoleReport, on_gpu

TOLD = 0.2  # two opinions on a round that differ by more say why


def show(found: Rehearsal, console: Console | None = None) -> None:
    """Print a line for every part of every role, a round's two times, and all findings."""
    console = console or Console()
    table = Table(title=f"rehearsed in {found.seconds:.0f} s, {found.peak_rss_mb / 1024:.1f} GiB")
    for name in ("role", "part", "rehearsed", "planned"):
        table.add_column(name, justify="left", overflow="fold")
    for role in found.roles:
        for part, rehearsed, planned in _lines(found, role):
            table.add_row(role.role, part, rehearsed, planned)
    ours, theirs = found.round_seconds, found.plan.seconds
    table.add_row("all", "round", f"{ours:.0f} s", f"{theirs:.0f} s")
    console.print(table)
    if abs(ours - theirs) > TOLD * theirs:
        console.print(_why(found), soft_wrap=True)
    for finding in found.findings:
        console.print(f"finding: {finding}", soft_wrap=True, markup=False, highlight=False)
    if not found.findings:
        console.print("nothing found")


def _lines(found: Rehearsal, role: RoleReport) -> list[tuple[str, str, str]]:
    slices = role.slices
    lines = [
        (
            "slices",
            f"{slices.ranks} of {role.world} ranks read {slices.tensors:,} tensors, "
            f"{len(slices.gaps)} gaps, {len(slices.overlaps)} overlaps",
            "",
        )
    ]
    plans = {role.computing: role.planned, PUSH: role.planned_push}
    for phase, kinds in role.phases.items():
        parts = ", ".join(f"{kind} {n / GIB:.1f}" for kind, n in kinds.items() if n > GIB / 20)
        planned = f"{plans[phase] / GIB:.1f} GiB" if phase in plans else ""
        lines.append((f"memory, {phase}", f"{on_gpu(kinds) / GIB:.1f} GiB: {parts}", planned))
    for hot, size in role.hot.items():
        lines.append((f"memory, expert rank x{hot:g}", f"{size / GIB:.1f} GiB", ""))
    lines.append(("kept after backward", f"{role.kept / GIB:.2f} GiB", "0"))
    if role.loaded_by:
        layouts = ", ".join(describe(layout).removeprefix("of ") for layout in role.loaded_by)
        lines.append(("checkpoint", f"every rank's pieces; read by {layouts}", ""))
    played = f"{role.calls:,} collectives and messages of {role.world} ranks, played"
    lines.append(("programs", played, ""))
    for axis, (moved, planned_bytes) in role.moved.items():
        if moved > GIB / 100:
            what = f"moved over {axis}, {role.microbatches} micro-batches"
            lines.append((what, f"{moved / GIB:.2f} GiB", f"{planned_bytes / GIB:.2f} GiB"))
    if role.push_seconds:
        pushed, planned = (f"{x:.2f} s" for x in role.push_seconds)
        lines.append(("time, push", pushed, planned))
    took = f"{role.seconds:.2f} s a micro-batch: {_costs(role)}"
    lines.append((f"time, {role.computing}", took, ""))
    return lines


def _why(found: Rehearsal) -> str:
    """Say where the trainer's time goes in the rehearsal, which the plan has by other formulas."""
    planned = found.planned_microbatch
    rehearsed = found.roles[0].seconds
    return (
        f"the two times of a round differ by more than {TOLD:.0%}: a full micro-batch of the "
        f"trainer takes {rehearsed:.2f} s here, {planned:.2f} s in the plan; here it goes to "
        f"{_costs(found.roles[0])}"
    )


def _costs(role: RoleReport) -> str:
    """Return the largest costs and their shares."""
    total = role.costs.total()
    shares = [(name, seconds / total) for name, seconds in role.costs.most_common(LARGEST)]
    return ", ".join(f"{name} {share:.0%}" for name, share in shares if share >= 0.005)
