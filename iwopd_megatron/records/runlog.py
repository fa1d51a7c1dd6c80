"""A run folder's metrics.jsonl, TensorBoard files, events: written by rank 0, read by reports."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import yaml

from iwopd_megatron.config.recipe import Recipe
from iwopd_megatron.files.run_files import append_record, read_records, write_whole
from iwopd_megatron.records.wandb_log import WandbLog

LINE = {"kind": str, "round": int}  # what every line of metrics.jsonl and timing.jsonl has
EVENT = {"round": int, "event": str, "text": str}


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Return the records of `run/metrics.jsonl`, each with its clock times from timing.jsonl."""
    records = read_records(run / "metrics.jsonl", LINE)
    timing = run / "timing.jsonl"
    clock = {_key(line): line for line in read_records(timing, LINE)} if timing.is_file() else {}
    return [record | clock.get(_key(record), {}) for record in records]


def _key(record: dict[str, Any]) -> tuple[str, int]:
    return record["kind"], record["round"]


def append_event(run: Path, round_number: int, kind: str, text: str) -> None:
    """Add to events.jsonl what a person should know later: gates, steps left out, restarts.

    Unlike metrics.jsonl it is not cut on resume: what stopped a run stays known.
    """
    run.mkdir(parents=True, exist_ok=True)
    line = {"time": time.time(), "round": round_number, "event": kind, "text": text}
    append_record(run / "events.jsonl", line)


def read_events(run: Path) -> list[dict[str, Any]]:
    """Return what gates, steps left out, restarts and resumptions wrote, oldest first."""
    file = run / "events.jsonl"
    return read_records(file, EVENT) if file.exists() else []


class MetricsLog:
    """Writes a run's metrics: an object a line, TensorBoard scalars, W&B where it is asked for.

    metrics.jsonl holds what the seed and the layout determine, timing.jsonl what the clock said.
    """

    def __init__(self, run: Path, resumed_round: int | None = None, wandb: WandbLog | None = None):
        """Begin empty, or after the lines up to `resumed_round`: later ones are written again."""
        from torch.utils.tensorboard import SummaryWriter

        run.mkdir(parents=True, exist_ok=True)
        self.run = run
        for name in ("metrics.jsonl", "timing.jsonl"):
            path, kept = run / name, []
            if resumed_round is not None and path.is_file():
                kept = [line for line in read_records(path, LINE) if line["round"] <= resumed_round]
            write_whole(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._wandb = wandb
        self._board = SummaryWriter(run / "tensorboard", purge_step=(resumed_round or 0) + 1)

    def write(self, line: dict[str, Any], clock: dict[str, Any] | None = None) -> None:
        """Append one line to each file; numbers that are not finite become null.

        line: "kind", "round" and what seed and layout determine; clock: what the clock said.
        """
        own = {"kind": line["kind"], "round": line["round"]}
        for name, record in (("metrics.jsonl", line), ("timing.jsonl", own | (clock or {}))):
            append_record(self.run / name, _finite(record))
        values = (line | (clock or {})).items()
        figures = {k: v for k, v in values if isinstance(v, int | float) and k != "round"}
        for key, value in figures.items():
            self._board.add_scalar(f"{line['kind']}/{key}", value, line["round"])
        if self._wandb is not None:
            self._wandb.write(line["kind"], line["round"], figures)

    def close(self) -> None:
        """Flush TensorBoard and end the W&B run."""
        self._board.close()
        if self._wandb is not None:
            self._wandb.close()


def open_log(recipe: Recipe, resumed_round: int | None) -> MetricsLog:
    """Open the log of a run that begins or goes on, and write the resolved recipe beside it."""
    recipe.out.mkdir(parents=True, exist_ok=True)
    wandb = WandbLog(recipe, recipe.wandb) if recipe.wandb is not None else None
    log = MetricsLog(recipe.out, resumed_round, wandb)
    resolved = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)
    write_whole(recipe.out / "recipe.yaml", resolved)
    return log


def truncated_shares(run: Path) -> list[float]:
    """Return the share of truncated answers of every round so far."""
    return [line["truncated"] for line in read_metrics(run) if "truncated" in line]


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
