"""What `iwopd status RUN` says: roles of the last launch, and how far the run is."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

from iwopd_megatron.errors import RecipeError
from iwopd_megatron.files.run_files import read_object
from iwopd_megatron.launch.rendezvous import FINAL, newest_attempt
from iwopd_megatron.launch.roles import read_job
from iwopd_megatron.records.runlog import read_metrics
from iwopd_megatron.records.words import percent


def run_status(run: Path, launch: Path | None, now: float | None = None) -> dict[str, Any]:
    """Return what is known of a run: "roles", "round", "tokens_per_second", "checkpoint", ...

    launch: the folder of its last launch, or None. now: seconds since 1970, of which
    "silent_seconds" is counted. RecipeError where `run` is not a run folder.
    """
    now = time.time() if now is None else now
    if launch is None and not (run / "metrics.jsonl").is_file():
        raise RecipeError(f"{run} is not a run folder: it has neither metrics.jsonl nor launch/.")
    found: dict[str, Any] = {"run": str(run)}
    if launch is not None:
        found |= _launch_status(launch, now)
    return found | _progress(run, now)


def _launch_status(launch: Path, now: float) -> dict[str, Any]:
    attempt = newest_attempt(launch)
    found: dict[str, Any] = {"launch": str(launch), "attempt": attempt}
    lines = {}
    if attempt is not None:
        folder = launch / f"attempt_{attempt}"
        for file in sorted((folder / "status").glob("*.json")):
            line = read_object(file)
            lines[line["role"], line["node"]] = line
        if (folder / "finished").is_file():
            found["exit_code"] = int((folder / "finished").read_text())
    if (launch / FINAL).is_file():
        found["final"] = (launch / FINAL).read_text().strip()
    found["roles"] = [
        _role_line(lines.get((role.name, node)), role.name, node, now)
        for role in read_job(launch).roles
        for node in range(role.nodes)
    ]
    return found


def _role_line(line: dict[str, Any] | None, role: str, node: int, now: float) -> dict[str, Any]:
    if line is None:
        return {"role": role, "node": node, "state": "not started"}
    return {key: value for key, value in line.items() if key != "time"} | {
        "seconds": round(now - line["time"])
    }


def _progress(run: Path, now: float) -> dict[str, Any]:
    """Return what the run folder's files say; a resumed run writes some of its rounds again."""
    found: dict[str, Any] = {}
    recipe, metrics = run / "recipe.yaml", run / "metrics.jsonl"
    if recipe.is_file():
        rounds = re.search(
            r"^  rounds: (\d+)$", recipe.read_text("utf-8", errors="replace"), re.MULTILINE
        )
        found["rounds"] = int(rounds[1]) if rounds else None
    if metrics.is_file():
        found["silent_seconds"] = round(now - metrics.stat().st_mtime)
        for line in read_metrics(run):
            found["round"] = line["round"]
            for key in ("tokens_per_second", "loss", "accuracy"):
                if key in line:
                    found[key] = line[key]
    saved = sorted((run / "checkpoints").glob("round_*"))
    saved = [folder for folder in saved if re.fullmatch(r"round_\d{6}", folder.name)]
    if saved:
        found["checkpoint"] = str(saved[-1])
    return found


def print_status(found: dict[str, Any]) -> None:
    """Print what `run_status` found: a table of roles, and a line of the run's progress."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    if "roles" in found:
        table = Table("role", "node", "host", "state", "for", "restarts", "")
        for line in found["roles"]:
            more = line.get("detail") or " ".join(line.get("urls", []))
            since = f"{line['seconds']} s" if "seconds" in line else ""
            node, restarts = str(line["node"]), str(line.get("restarts", ""))
            host, state = line.get("host", ""), line["state"]
            table.add_row(line["role"], node, host, state, since, restarts, more)
        console.print(table)
    names = {
        "attempt": "attempt {}",
        "exit_code": "ended with exit code {}",
        "final": "{}",
        "round": "round {}" + (f" of {found['rounds']}" if found.get("rounds") else ""),
        "tokens_per_second": "{:,.0f} tokens/s",
        "loss": "loss {:+.4f}",
        "accuracy": f"accuracy {percent(found.get('accuracy'))} %",
        "checkpoint": "checkpoint {}",
        "silent_seconds": "last line {} s ago",
    }
    parts = [text.format(found[key]) for key, text in names.items() if found.get(key) is not None]
    console.print(", ".join(parts) or "no round yet", soft_wrap=True)
