"""Recipes and profiles become roles; what cannot run is refused before anything is submitted."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from iwopd_megatron.config.load import load_recipe, read_recipe
from iwopd_megatron.errors import RecipeError
from iwopd_megatron.files.shipped import PROFILES
from iwopd_megatron.launch.launch import make_job, new_folder, newest_folder, write_job
from iwopd_megatron.launch.profile import Profile, load_profile
from iwopd_megatron.launch.rehearsed import rehearse
from iwopd_megatron.launch.roles import Job, read_job
from iwopd_megatron.launch.submit import verdict

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "recipes" / "demo_tiny_moe.yaml"
LAUNCH = [sys.executable, "-W", "ignore", "-m", "iwopd_megatron", "launch"]
SERVED = ["teacher.service.parallel.tp=2", "rollout.engine=sglang", "rollout.servers.start=2"]


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def profile(**settings) -> Profile:
    tree = {"executor": "slurm", "gpu": "cpu", "gpus_per_node": 2, "slurm": {"account": "a"}}
    return Profile.model_validate(tree | settings)


def write_profile(tmp_path: Path, text: str) -> str:
    (tmp_path / "site.yaml").write_text(text)
    return str(tmp_path / "site.yaml")


def job_of(tmp_path: Path, *overrides: str, **settings) -> Job:
    recipe = load_recipe(DEMO, [f"out={tmp_path}/run", *overrides])
    return make_job(recipe, profile(**settings), tmp_path / "launch")


def roles_of(job: Job) -> list[tuple]:
    return [(r.name, r.nodes, r.per_node, r.gpus_each, r.is_world, r.urls) for r in job.roles]


def test_embedded_models_make_one_role(tmp_path):
    job = job_of(tmp_path, "processes=4")
    assert roles_of(job) == [("trainer", 2, 2, 1, True, 0)]
    assert job.roles[0].command[-2:] == [str(tmp_path / "launch" / "recipe.yaml"), "--resume"]


def test_services_have_roles_of_their_own(tmp_path):
    job = job_of(tmp_path, "processes=4", *SERVED)
    assert roles_of(job) == [
        ("trainer", 2, 2, 1, True, 0),
        ("teacher", 1, 2, 1, True, 1),
        ("rollout", 1, 2, 1, False, 2),
    ]
    assert [role.max_restarts for role in job.roles] == [0, 3, 3]
    assert [role.urls_key for role in job.services] == ["teacher.urls", "rollout.servers.urls"]


def test_services_that_run_elsewhere_have_no_role(tmp_path):
    job = job_of(
        tmp_path, *SERVED, "teacher.urls=[http://a:1]", "rollout.servers.urls=[http://b:2]"
    )
    assert [role.name for role in job.roles] == ["trainer"]


def test_cluster_section_sizes_the_roles(tmp_path):
    cluster = "cluster={gpus_per_node: 2, trainer: 4, teacher: 4, rollout: 2}"
    job = job_of(tmp_path, *SERVED, cluster, "rollout.servers.tp=2", gpu="h100-80")
    assert roles_of(job) == [
        ("trainer", 2, 2, 1, True, 0),
        ("teacher", 2, 2, 1, True, 1),
        ("rollout", 1, 1, 2, False, 1),
    ]
    assert "teacher.service.processes=4" in job.role("teacher").command


def test_a_source_of_several_teachers_is_named(tmp_path):
    recipe = load_recipe(DEMO, [f"out={tmp_path}", *SERVED])
    one = recipe.teacher
    several = recipe.model_copy(update={"teacher": None, "teachers": {"math": one, "code": one}})
    job = make_job(several, profile(), tmp_path)
    assert [role.name for role in job.roles[1:3]] == ["teacher-math", "teacher-code"]
    assert job.roles[2].command[-2:] == ["--source", "code"]
    assert job.roles[2].urls_key == "teachers.code.urls"


def test_services_share_the_teachers_gpus_and_embedded_teachers_take_none(tmp_path):
    recipe = load_recipe(DEMO, [f"out={tmp_path}", *SERVED, "cluster={trainer: 2, teacher: 8}"])
    served, embedded = recipe.teacher, recipe.teacher.model_copy(update={"service": None})
    asking = served.model_copy(
        update={"service": served.service.model_copy(update={"processes": 2})}
    )
    for teachers, processes in (
        ({"math": served, "code": embedded}, [8]),
        ({"math": served, "code": served}, [4, 4]),
        ({"math": served, "code": asking}, [6, 2]),
    ):
        several = recipe.model_copy(update={"teacher": None, "teachers": teachers})
        job = make_job(several, profile(), tmp_path)
        assert [r.processes for r in job.roles if r.name.startswith("teacher-")] == processes


@pytest.mark.parametrize(
    ("overrides", "settings", "sentence"),
    [
        (["processes=6"], {"gpus_per_node": 4}, "6 processes of 1 GPUs do not fill whole nodes"),
        ([*SERVED, "rollout.servers.tp=4"], {}, "a rollout server takes 4 GPUs but nodes have 2"),
        (["processes=4"], {"executor": "local"}, "the roles need 2 machines"),
        (["cluster={trainer: 2, teacher: 2}"], {}, "no teacher has one; add teacher.service"),
        ([*SERVED, "cluster={trainer: 2, teacher: 3}"], {},
         "cluster.teacher=3 is not a multiple of 2, what the layout tp2 needs; write 4"),
        ([*SERVED, "cluster={trainer: 2, teacher: 4}", "teacher.service.processes=2"], {},
         "teacher.service.processes=2 differs from cluster.teacher=4; write processes=4"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(tmp_path, overrides, settings, sentence):
    with pytest.raises(RecipeError, match=sentence):
        job_of(tmp_path, *overrides, **settings)


def test_servers_that_nobody_counts_are_refused(tmp_path):
    recipe = read_recipe(DEMO, ["rollout.engine=sglang"])
    with pytest.raises(RecipeError, match="rollout.engine=sglang has no servers"):
        make_job(recipe, profile(), tmp_path)


@pytest.mark.parametrize("name", sorted(file.stem for file in (ROOT / "recipes").glob("*.yaml")))
def test_every_recipe_has_a_place_on_a_cluster(tmp_path, name):
    recipe, site = read_recipe(ROOT / "recipes" / f"{name}.yaml"), load_profile("slurm_h100")
    job = make_job(recipe, site, tmp_path)
    cluster = recipe.cluster
    if cluster is not None:
        gpus = {role.name: role.processes * role.gpus_each for role in job.roles}
        wanted = {name: getattr(cluster, name) for name in ("trainer", "teacher", "rollout")}
        assert gpus == {name: count for name, count in wanted.items() if count}
        assert verdict(recipe, site).startswith("fits h100-80")


def test_a_plan_that_does_not_fit_says_what_to_turn():
    recipe = read_recipe(
        ROOT / "recipes" / "qwen3_235b_a22b_to_30b_a3b.yaml", ["student.recompute=none"]
    )
    assert re.match(
        r"does not fit h100-80: \w+ needs more memory; student\.recompute=",
        verdict(recipe, load_profile("slurm_h100")),
    )


def test_job_and_recipe_survive_the_launch_folder(tmp_path):
    recipe = load_recipe(DEMO, [f"out={tmp_path}/run", "train.lr=1e-5", *SERVED])
    folder = new_folder(recipe)
    job = make_job(recipe, profile(), folder)
    write_job(job, recipe, folder)
    assert read_job(folder) == job
    assert load_recipe(folder / "recipe.yaml") == recipe
    assert newest_folder(recipe.out) == folder


@pytest.mark.parametrize("name", sorted(file.stem for file in PROFILES.glob("*.yaml")))
def test_shipped_profiles_load(name):
    assert load_profile(name).executor in ("local", "docker", "slurm", "skypilot")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("executor: slurm\ngpu: cpu\n", "executor slurm needs a section 'slurm'"),
        ("executor: slurm\ngpu: cpu\nslurm: {}\n", "'slurm.account' is missing; add it."),
        ("executor: slurm\ngpu: cpu\nslurm: {account: a, acount: b}\n", "did you mean 'account'?"),
        ("executor: lsf\ngpu: cpu\n", "'executor' is 'lsf'"),
        ("executor: local\ngpu: cpu\nenv: {HF_TOKEN: x}\n", "env.HF_TOKEN looks like a secret"),
        ("executor: local\ngpu: cpu\nenv: {MY_API_KEY: x}\n", "looks like a secret"),
        ("executor: local\ngpu: cpu\ncontainer: a\n", "runs without containers"),
        ("executor: docker\ngpu: cpu\n", "needs 'container'"),
        ("a: [", "is not valid YAML"),
    ],
)
def test_bad_profiles_are_refused(tmp_path, text, sentence):
    with pytest.raises(RecipeError) as error:
        load_profile(write_profile(tmp_path, text))
    assert sentence in str(error.value)


def test_unknown_profile_names_those_there_are():
    with pytest.raises(RecipeError, match="does not exist; .* one of: docker, laptop, local"):
        load_profile("nowhere")


def test_profile_overrides_tuning(tmp_path):
    job = job_of(tmp_path, gpu="h100-80", env={"NCCL_NVLS_ENABLE": "1"})
    assert job.roles[0].env["NCCL_NVLS_ENABLE"] == "1"


def test_launching_needs_no_torch():
    code = (
        "import sys, iwopd_megatron.cli.main; from iwopd_megatron.launch import agent, launch;"
        "print([m for m in ('torch', 'transformers', 'nemo_run') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([str(DEMO), "student.parallel.tp=3"], "tp=3 does not divide"),
        ([str(DEMO), "--cluster", "nowhere"], "cluster profile"),
        ([str(DEMO), "processes=16"], "the roles need 2 machines"),
    ],
)
def test_bad_launches_exit_with_2_and_leave_nothing(tmp_path, arguments, sentence):
    done = subprocess.run(
        [*LAUNCH, *arguments, f"out={tmp_path}/run"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert sentence in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_folder_that_holds_a_run_is_not_launched_over(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    done = subprocess.run([*LAUNCH, str(DEMO), f"out={tmp_path}"], capture_output=True, text=True)
    assert (done.returncode, "add --resume" in done.stderr) == (2, True)


def test_missing_nemo_run_is_one_sentence(tmp_path):
    """Installed or not, it cannot be imported here."""
    (tmp_path / "nemo_run.py").write_text("raise ImportError('no NeMo-Run here')")
    env = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = subprocess.run(
        [*LAUNCH, str(DEMO), f"out={tmp_path}/run"], capture_output=True, text=True, env=env
    )
    assert done.returncode == 1
    assert "make cluster-venv" in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


COMPARE = [*LAUNCH[:-1], "compare", str(DEMO), "--seeds", "1"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--dryrun"], "name their cluster with --cluster PROFILE"),
        (["--cluster", "nowhere"], "cluster profile"),
        # the first arm could run
        (["--cluster", "local", "--vary", "processes=2,16"], "the roles need 2 machines"),
    ],
)
def test_bad_comparisons_launch_nothing(tmp_path, arguments, sentence):
    command = [*COMPARE, *arguments, "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and sentence in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_where_nothing_can_rehearse_that_is_said(capsys, monkeypatch):
    recipe = Path("recipes/qwen3_4b_to_0p6b.yaml")
    monkeypatch.setattr(sys, "executable", "nothing")
    rehearse(recipe, [], read_recipe(recipe, []), profile(gpu="h100-80", python="nowhere"))
    assert "the launch is not rehearsed" in capsys.readouterr().out
