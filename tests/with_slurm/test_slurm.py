"""Launches through NeMo-Run on a real Slurm, with the real trainer, teacher and SGLang."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

from launches import LAUNCHER, ROOT, until

from iwopd_megatron.launch.launch import newest_folder

DEMO = "recipes/demo_tiny_moe.yaml"
SECRETS = {"HF_TOKEN": "hf_do_not_write_this", "WANDB_API_KEY": "wandb_do_not_write_this"}
SMALL = ["evaluate.problems=32", "evaluate.every=100", "train.prompts_per_round=32"]
SMALL += ["train.warmup_rounds=0"]
# Trainer on two nodes of two processes, a Megatron teacher service and a real SGLang server.
THREE_ROLES = [
    "processes=4",
    "teacher.service={}",
    "rollout.engine=sglang",
    "rollout.servers.start=1",
    "rollout.servers.python=build/sglang-venv/bin/python",
    "rollout.servers.env={PYTHONPATH: tests/with_sglang/environment, OMP_NUM_THREADS: '1'}",
    "rollout.servers.hang_timeout_s=300",
    "checkpoint.every=1",
]


def iwopd(*arguments: str) -> str:
    """In the trainer's environment, which has what draws."""
    command = [sys.executable, "-W", "ignore", "-m", "iwopd_megatron", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def rounds(run: Path) -> list[int]:
    file = run / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [line["round"] for line in lines if line["kind"] == "round"]


def role(status: dict, name: str, node: int = 0) -> dict:
    return next(r for r in status["roles"] if (r["role"], r["node"]) == (name, node))


# The longest is first: the other worker has all others meanwhile.
def test_three_roles_survive_the_death_of_teacher_and_trainer(cluster, tmp_path):
    run = tmp_path / "run"
    job = cluster.submit(DEMO, *THREE_ROLES, *SMALL, "train.rounds=12", f"out={run}")
    until(lambda: len(rounds(run)) >= 2)
    before = cluster.status(run)
    assert [r["state"] for r in before["roles"]] == ["running", "running", "ready", "ready"]

    os.kill(role(before, "teacher")["pids"][0], signal.SIGKILL)
    until(lambda: role(cluster.status(run), "teacher").get("restarts") == 1)
    seen = max(rounds(run))
    until(lambda: max(rounds(run)) > seen + 1, every=0.1)

    os.kill(role(before, "trainer", 1)["pids"][0], signal.SIGKILL)
    saved = max(int(p.name[6:]) for p in (run / "checkpoints").glob("round_??????"))
    assert cluster.states(job) == ["RUNNING"]
    until(lambda: cluster.states(job) == ["REQUEUED", "COMPLETED"])
    assert rounds(run) == list(range(1, 13))
    after = cluster.status(run)
    assert (after["attempt"], after["exit_code"], after["round"]) == (1, 0, 12)
    assert (run / "hf" / "model.safetensors").is_file()
    log = cluster.iwopd("attach", str(run))
    resumed = re.search(r"trainer attempt 1 \| resumed after round (\d+)", log)
    assert int(resumed[1]) >= saved
    assert re.search(r"teacher \| teacher node 0: ended with exit code 137; restart 1 of 3", log)


def test_scripts_of_a_dry_run(cluster, tmp_path):
    run = tmp_path / "run"
    before = cluster.jobs()
    done = cluster.launch(DEMO, *THREE_ROLES, f"out={run}", "--dryrun", **SECRETS)
    assert done.returncode == 0, done.stderr
    assert cluster.jobs() == before
    folder = newest_folder(run)
    (script,) = folder.glob("experiments/*/*/*_sbatch.sh")
    assert str(script) in done.stdout
    text = script.read_text()
    assert text.count("#SBATCH hetjob") == 2
    assert re.findall(r"#SBATCH --nodes=(\d)", text) == ["2", "1", "1"]
    assert re.findall(r"#SBATCH --gpus-per-node=(\d)", text) == ["2", "1", "1"]
    assert text.count("#SBATCH --signal=B:TERM@60") == 3
    assert re.findall(r"--het-group=(\d)", text) == ["0", "1", "2"]
    for file in folder.rglob("*"):
        if file.is_file():
            assert "do_not_write_this" not in file.read_text(errors="replace"), file


def test_a_comparison_is_a_job_for_each_run(cluster, tmp_path):
    out = tmp_path / "rules"
    words = [DEMO, *SMALL, "train.rounds=2", "--seeds", "2", "--out", str(out)]
    done = cluster.launch(*words, "--dryrun", command="compare")
    assert done.returncode == 0, done.stderr
    assert len(list(out.glob("*/seed_*/launch/*/experiments/*/*/*_sbatch.sh"))) == 4
    done = cluster.launch(*words, command="compare")
    assert done.returncode == 0, done.stderr
    assert len(set(re.findall(r"job (\d+) launched", done.stdout))) == 4
    runs = [out / arm / f"seed_{seed}" for arm in ("opd", "iw") for seed in (1, 2)]
    until(lambda: all((run / "hf" / "config.json").is_file() for run in runs), 300)
    assert [rounds(run) for run in runs] == [[1, 2]] * 4
    until(lambda: not cluster.bed.output("squeue", "-h").strip(), 60)
    again = cluster.launch(*words, "--resume", command="compare")
    assert again.returncode == 0 and "launched" not in again.stdout  # all have ended
    page = Path(iwopd("report", str(out)).strip()).read_text()
    row = page[page.index("<span>IW-OPD</span>") :].splitlines()[0]
    assert "<span>2</span>" in row


def test_every_recipe_has_scripts(cluster, tmp_path):
    """One process for all of them: NeMo-Run takes seconds to import."""
    recipes = sorted((ROOT / "recipes").glob("qwen3_*.yaml"))
    code = "import pathlib, sys; from iwopd_megatron.cli.launch import launch\n"
    code += "for i, recipe in enumerate(sys.argv[2:]):\n"
    code += (
        "  launch(pathlib.Path(recipe), [f'out={sys.argv[1]}/{i}'], 'slurm_h100', True, False)\n"
    )
    command = [LAUNCHER, "-W", "ignore", "-c", code, tmp_path, *recipes]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("plan: fits h100-80") == len(recipes) >= 20
    for script in sorted(tmp_path.glob("*/launch/*/experiments/*/*/*_sbatch.sh")):
        assert subprocess.run(["bash", "-n", script]).returncode == 0
    assert len(sorted(tmp_path.glob("*/launch/*/experiments/*/*/*_sbatch.sh"))) == len(recipes)


def test_bad_recipes_never_reach_slurm(cluster, tmp_path):
    before = cluster.jobs()
    done = cluster.launch(DEMO, f"out={tmp_path}/run", "student.parallel.ep=3")
    assert done.returncode == 2
    assert "ep=3 does not divide the number of experts" in done.stderr
    assert cluster.jobs() == before


def test_warning_before_the_limit_saves_and_requeues(cluster, tmp_path):
    run = tmp_path / "run"
    job = cluster.submit(DEMO, "processes=4", *SMALL, "train.rounds=400", f"out={run}")
    until(lambda: len(rounds(run)) >= 2)
    cluster.bed.output("scancel", "--batch", "--signal=TERM", job)  # what --signal=B:TERM sends
    until(lambda: cluster.states(job) == ["REQUEUED", "RUNNING"])
    seen = max(rounds(run))
    until(lambda: max(rounds(run)) > seen)
    assert rounds(run) == list(range(1, max(rounds(run)) + 1))
    (first,) = newest_folder(run).glob("experiments/*/*/*/log-*_0.out")
    stopped = re.search(r"stopped after round (\d+)", first.read_text())
    (second,) = newest_folder(run).glob("experiments/*/*/*/log-*_1.out")
    assert f"resumed after round {stopped[1]}" in second.read_text()


def test_what_only_a_person_can_mend_is_not_requeued(cluster, tmp_path):
    """The data file goes away between the launch and the start."""
    data = tmp_path / "train.jsonl"
    data.write_text((ROOT / "recipes" / "demo" / "train.jsonl").read_text())
    cluster.bed.output("scontrol", "update", "PartitionName=batch", "State=DOWN")
    job = cluster.submit(DEMO, f"out={tmp_path}/run", f"data.train={data}")
    data.unlink()
    cluster.bed.output("scontrol", "update", "PartitionName=batch", "State=UP")
    until(lambda: cluster.states(job) not in ([], ["PENDING"], ["RUNNING"]))
    assert cluster.states(job) == ["FAILED"]
    assert "RecipeError" in cluster.status(tmp_path / "run")["final"]
