"""Scoring answers as they end against generate-then-score: the demo with real servers.

One SGLang server and one teacher service serve all runs, which alternate. Usage:
streaming.py [runs]
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from iwopd_megatron.config.load import load_recipe
from iwopd_megatron.records.runlog import read_metrics
from iwopd_megatron.rollout.make import server_command
from iwopd_megatron.rollout.sglang import SglangServer
from iwopd_megatron.runtime.keeper import Keeper
from iwopd_megatron.runtime.services import Server, free_port, outer_environment

RECIPE = "recipes/demo_sglang.yaml"
ROUNDS, WARM = 14, 4  # the first WARM rounds of a run are left out
ARMS = {
    "generate, then score": ["rollout.stream_scoring=false"],
    "score as answers end": [],
    "and generate while training": ["rollout.max_staleness=1"],
}


def start_services(folder: Path) -> tuple[Keeper, list[str]]:
    """A rollout server and a teacher service, and the overrides that name them."""
    recipe, ports = load_recipe(Path(RECIPE)), (free_port(), free_port())
    settings = recipe.rollout.servers
    env = outer_environment() | SglangServer.environment() | settings.env
    rollout = [str(settings.python), *server_command(recipe, ports[0])]
    teacher = [
        sys.executable,
        "-m",
        "iwopd_megatron",
        "serve-teacher",
        RECIPE,
        f"--port={ports[1]}",
    ]
    urls = [f"http://127.0.0.1:{port}" for port in ports]
    servers = [
        Server("rollout", rollout, env, folder / "rollout.log", urls[0]),
        Server("teacher", teacher, None, folder / "teacher.log", urls[1]),
    ]
    keeper = Keeper(servers, 600)
    keeper.start()
    keeper.wait_ready()
    return keeper, [f"rollout.servers={{urls: ['{urls[0]}']}}", f"teacher.urls=['{urls[1]}']"]


def run(folder: Path, overrides: list[str]) -> list[dict]:
    """The rounds of one run, the first ones left out."""
    out = folder / "run"
    shutil.rmtree(out, ignore_errors=True)
    settings = [f"out={out}", f"train.rounds={ROUNDS}", "data.eval=null", "checkpoint.every=null"]
    command = [sys.executable, "-W", "ignore", "-m", "iwopd_megatron", "train", RECIPE]
    subprocess.run([*command, *settings, *overrides], check=True, stdout=subprocess.DEVNULL)
    return [line for line in read_metrics(out) if line["kind"] == "round"][WARM:]


def main() -> None:
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    rounds: dict[str, list[dict]] = {name: [] for name in ARMS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        keeper, urls = start_services(folder)
        try:
            for _ in range(repeats):
                for arm, overrides in ARMS.items():
                    rounds[arm] += run(folder, [*urls, *overrides])
        finally:
            keeper.stop()
    table = Table(title=f"{repeats} runs of {ROUNDS - WARM} rounds, 64 prompts; medians of a round")
    for column in ("", "round (s)", "generate", "score", "train", "sync", "scored early", "ratio"):
        table.add_column(column)
    base, ratios = None, {}
    for arm, lines in rounds.items():
        wall = statistics.median(line["seconds"] for line in lines)
        base = base or wall
        ratios[arm] = wall / base
        phases = [
            f"{statistics.median(line['time'][phase] for line in lines):.3f}"
            for phase in ("generate", "score", "train", "sync")
        ]
        early = statistics.mean(line["scored_early"] for line in lines)
        table.add_row(arm, f"{wall:.3f}", *phases, f"{early:.0%}", f"{wall / base:.2f}")
    Console(width=110).print(table)
    print(json.dumps({"round_over_generate_then_score": ratios}))


if __name__ == "__main__":
    main()
