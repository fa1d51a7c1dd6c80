"""A plan as a picture: memory bars of the roles (x axis in GiB), and the round's timeline (s)."""

from __future__ import annotations

import base64
import io
from itertools import cycle
from pathlib import Path
from typing import Any

from iwopd_megatron.plan.hardware import GIB
from iwopd_megatron.plan.plan import Plan
from iwopd_megatron.plan.text import notes

COLOURS = {
    "weights": "#4269d0", "gradients": "#efb118", "optimizer": "#ff725c", "activations": "#6cc5b0",
    "head": "#3ca951", "communication": "#a463f2", "scorer": "#97bbf5", "kv_cache": "#9c6b4e",
    "reserve": "#c8c8c8", "context": "#8a8a8a",
}  # fmt: skip
MODEL_COLOURS = ("#97bbf5", "#ff8ab7", "#b6e2a1", "#ffd27f", "#c9a2e8")  # several embedded ones
ROLE_COLOURS = {"rollout": "#9c6b4e", "teacher": "#97bbf5", "trainer": "#4269d0"}


def write_picture(plan: Plan, file: Path) -> None:
    """Write memory bars and the round's timeline as .png, or as .html with the picture inside."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, (bars, line) = plt.subplots(
        2, 1, figsize=(9, 5.6), height_ratios=[len(plan.roles) + 1, len(plan.phases) + 1]
    )
    _memory_bars(bars, plan)
    _timeline(line, plan)
    figure.tight_layout()
    if file.suffix == ".html":
        stream = io.BytesIO()
        figure.savefig(stream, format="png", dpi=150)
        picture = base64.b64encode(stream.getvalue()).decode()
        text = "".join(f"<p>{note}</p>" for note in notes(plan))
        style = "body{font:15px sans-serif;max-width:960px;margin:2em auto}img{width:100%}"
        image = f'<img alt="memory and timeline" src="data:image/png;base64,{picture}">'
        head = f"<!doctype html><meta charset=utf-8><title>plan</title><style>{style}</style>"
        file.write_text(head + image + text)
    else:
        figure.savefig(file, dpi=150)
    plt.close(figure)


def _memory_bars(axes: Any, plan: Plan) -> None:
    seen: set[str] = set()
    models = [name for role in plan.roles for name in role.embedded]
    colours = COLOURS | dict(zip(models, cycle(MODEL_COLOURS), strict=False))
    for row, role in enumerate(plan.roles):
        parts = {name: size for name, size in role.parts.items() if size}
        parts["reserve"] = role.memory.total - sum(parts.values())
        left = 0.0
        for name, size in parts.items():
            label = None if name in seen else name.replace("_", " ")
            axes.barh(row, size / GIB, left=left, color=colours[name], label=label, height=0.6)
            left += size / GIB
            seen.add(name)
    names = [f"{role.name}\n{role.gpus} GPUs" for role in plan.roles]
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    capacity = plan.roles[0].capacity / GIB
    axes.axvline(capacity, color="black", linestyle="--", linewidth=1)
    largest = max(role.memory.total for role in plan.roles) / GIB
    axes.set_xlim(0, 1.06 * max(capacity, largest))
    verdict = "fits" if plan.fits else "does not fit"
    axes.set_title(
        f"GiB on the busiest {plan.setup.cluster.gpu} of each role: {verdict}", loc="left"
    )
    axes.legend(ncols=5, fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(0, -0.16))
    axes.spines[["top", "right"]].set_visible(False)


def _timeline(axes: Any, plan: Plan) -> None:
    width = max(phase.start + phase.seconds for phase in plan.phases)
    for row, phase in enumerate(plan.phases):
        colour = ROLE_COLOURS.get(phase.role, ROLE_COLOURS["teacher"])  # or one of several
        axes.barh(row, phase.seconds, left=phase.start, color=colour, height=0.6)
        text = f"{phase.seconds:.1f} s" + (" (hidden)" if phase.is_hidden else "")
        is_late = phase.start > 0.5 * width  # then the number stands on the left
        place = (
            phase.start - 0.01 * width if is_late else phase.start + phase.seconds + 0.01 * width
        )
        align = "right" if is_late else "left"
        axes.text(place, row, text, va="center", ha=align, fontsize=8)
    if plan.setup.recipe.is_distilling:
        written = plan.generation
        quarter = written.seconds * (1 - written.tail)
        axes.barh(0, written.seconds - quarter, left=quarter, color="white", alpha=0.45, height=0.6)
    axes.set_yticks(range(len(plan.phases)), [phase.name for phase in plan.phases])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.1 * width)
    pale = "; pale: less than a quarter of the responses left" * plan.setup.recipe.is_distilling
    axes.set_xlabel(f"seconds{pale}")
    axes.set_title(f"a round: {plan.seconds:.0f} s", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
