"""Planning with several teachers: their memory, GPUs, shares of the samples, and time."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from iwopd_megatron.cli.main import app
from iwopd_megatron.config.load import read_recipe
from iwopd_megatron.errors import RecipeError
from iwopd_megatron.launch.launch import make_job
from iwopd_megatron.launch.profile import Profile
from iwopd_megatron.launch.submit import print_roles
from iwopd_megatron.plan.plan import plan
from iwopd_megatron.plan.search import search
from iwopd_megatron.plan.text import notes, overrides

pytestmark = pytest.mark.usefixtures("in_the_repository")
SMALL = Path("recipes/qwen3_30b_a3b_to_4b.yaml")
BIG, DENSE = "models/Qwen3-30B-A3B-Instruct-2507", "models/Qwen3-4B-Instruct-2507"
BIG_BYTES, DENSE_BYTES = 2 * 30_532_122_624, 2 * 4_022_468_096  # bf16, as published
SHARES = "data.train=[{name: deepmath, share: 3}, {name: eurus_code, share: 1}]"
EMBEDDED = ["cluster={trainer: 4, rollout: 4}", SHARES]
SERVICES = ["cluster={trainer: 3, teacher: 3, rollout: 2}", "rollout.servers.start=1", SHARES]
PROFILE = Profile.model_validate(
    {"executor": "slurm", "gpu": "h100-80", "gpus_per_node": 8, "slurm": {"account": "a"}}
)
SERVED_BIG, SERVED_DENSE = "service: {processes: 2}", "service: {processes: 1}"


def two(math="", code=""):
    """Overrides: a mixture of experts scores math, a dense model code."""
    return [
        "teacher=null",
        f"teachers.math={{hf: {BIG}, dtype: bf16, {math}}}",
        f"teachers.code={{hf: {DENSE}, dtype: bf16, {code}}}",
    ]


def planned(*words):
    return plan(read_recipe(SMALL, list(words)))


def phase(found, name):
    return next(phase for phase in found.phases if phase.name == name)


def alone(hf, cluster, service="null"):
    """Scoring seconds of this model if it scored everything."""
    words = f"{{hf: {hf}, dtype: bf16, service: {service}}}"
    return phase(planned(f"teacher={words}", *cluster), "scoring").seconds


def test_embedded_teachers_lie_side_by_side():
    trainer = planned(*EMBEDDED, *two()).roles[0]
    assert trainer.parts["teachers.math"] == BIG_BYTES
    assert trainer.parts["teachers.code"] == DENSE_BYTES
    assert trainer.memory.scorer == BIG_BYTES + DENSE_BYTES
    assert "scorer" not in trainer.parts and sum(trainer.parts.values()) == pytest.approx(
        trainer.memory.allocated + trainer.memory.context
    )
    assert not trainer.fits and trainer.knob.startswith("teachers.math.service with")


def test_offloaded_teachers_come_one_after_the_other():
    small = [*EMBEDDED, "student.hf=models/Qwen3-0.6B"]
    both = planned(*small, *two("offload: true", "offload: true")).roles[0]
    assert (both.parts["teachers.math"], both.parts["teachers.code"]) == (BIG_BYTES, 0)
    one = planned(*small, *two("offload: true")).roles[0]
    assert one.memory.scorer == BIG_BYTES + DENSE_BYTES
    away = [*two("urls: ['http://a:1']", "offload: true"), "teachers.code.hf=models/Qwen3-0.6B"]
    assert planned(*EMBEDDED, *away).roles[0].memory.scorer == 0  # training needs more


def test_embedded_teachers_score_one_after_the_other():
    found = planned(*EMBEDDED, *two())
    math, code = phase(found, "scoring teachers.math"), phase(found, "scoring teachers.code")
    assert math.seconds == pytest.approx(0.75 * alone(BIG, EMBEDDED[:1]))
    assert code.seconds == pytest.approx(0.25 * alone(DENSE, EMBEDDED[:1]))
    assert (math.role, code.role) == ("trainer", "trainer")
    written = found.generation.seconds
    assert (math.start, code.start) == pytest.approx((written, written + math.seconds))
    begin = phase(found, "forward/backward").start
    assert begin == pytest.approx(written + math.seconds + code.seconds)


def test_services_have_gpus_of_their_own_and_score_side_by_side():
    found = planned(*SERVICES, *two(SERVED_BIG, SERVED_DENSE), "rollout.max_response_tokens=2000")
    roles = {role.name: role for role in found.roles}
    assert [(role.name, role.gpus) for role in found.roles] == [
        ("trainer", 3),
        ("teachers.math", 2),
        ("teachers.code", 1),
        ("rollout", 2),
    ]
    assert roles["teachers.math"].memory.weights == BIG_BYTES
    assert roles["teachers.code"].memory.weights == DENSE_BYTES
    assert roles["trainer"].memory.scorer == 0 and found.gpus == 8
    math, code = phase(found, "scoring teachers.math"), phase(found, "scoring teachers.code")
    short = ["rollout.servers.start=1", "rollout.max_response_tokens=2000"]
    on_two = ["cluster={trainer: 3, teacher: 2, rollout: 2}", *short]
    on_one = ["cluster={trainer: 3, teacher: 1, rollout: 2}", *short]
    assert math.seconds == pytest.approx(0.75 * alone(BIG, on_two, "{processes: 2}"))
    assert code.seconds == pytest.approx(0.25 * alone(DENSE, on_one, "{processes: 1}"))
    ends = [found.generation.seconds, math.start + math.seconds, code.start + code.seconds]
    assert phase(found, "forward/backward").start == pytest.approx(max(ends))
    assert phase(found, "forward/backward").start < sum(ends)


def test_an_embedded_teacher_scores_while_a_service_still_does():
    words = [*two("service: {}"), SHARES, "rollout.max_response_tokens=2000"]
    words += ["cluster={trainer: 1, teacher: 1, rollout: 2}", "rollout.servers.start=1"]
    found = planned(*words)
    math, code = phase(found, "scoring teachers.math"), phase(found, "scoring teachers.code")
    assert (math.role, code.role) == ("teachers.math", "trainer")
    assert found.roles[0].memory.scorer == DENSE_BYTES
    assert code.start == found.generation.seconds
    served = math.start + math.seconds
    begin, last = phase(found, "forward/backward").start, found.phases[-1]
    assert begin == pytest.approx(max(served, code.start + code.seconds))
    ahead = planned(*words, "rollout.max_staleness=1")
    trained = last.start - code.start
    assert trained > served > code.start
    assert ahead.seconds == pytest.approx(trained + last.seconds)


@pytest.mark.parametrize("service", ["null", "{}"])
def test_a_teacher_at_urls_costs_nothing(service):
    found = planned(*EMBEDDED, *two(f"urls: ['http://a:1'], service: {service}"))
    assert [role.name for role in found.roles] == ["trainer", "rollout"]
    assert found.roles[0].memory.scorer == DENSE_BYTES
    assert phase(found, "scoring teachers.math").seconds == 0


@pytest.mark.parametrize(
    ("train", "shares"),
    [
        ("[{name: deepmath, share: 0.9}, {name: eurus_code, share: 0.3}]", (0.75, 0.25)),
        ("[{path: a, source: math, share: 1}, {name: deepmath, share: 2}, "
         "{path: b, source: code, share: 1}]", (0.75, 0.25)),
        ("[{name: deepmath}]", (1, 0)),
        ("[{name: deepmath}, {name: eurus_code}]", None),
        ("[{path: a, share: 3}, {name: eurus_code, share: 1}]", None),
        ("a.jsonl", None),
    ],
)  # fmt: skip
def test_shares_are_those_of_the_mix_or_assumed_equal(train, shares):
    found = planned(*EMBEDDED, *two(), f"data.train={train}")
    assert [s.share for s in found.setup.teachers] == pytest.approx(shares or (0.5, 0.5))
    (line,) = [line for line in notes(found) if line.startswith("scored responses")]
    assert f"teachers.math {(shares or (0.5,))[0]:.0%}, teachers.code" in line
    assert ("assumed: data.train does not say" in line) == (shares is None)
    if shares == (1, 0):
        assert phase(found, "scoring teachers.code").seconds == 0


def test_launcher_and_planner_give_services_the_same_gpus():
    for math, code, gpus in (
        ("service: {}", "service: {}", {"math": 4, "code": 4}),
        ("service: {parallel: {ep: 2}}", "service: {processes: 2}", {"math": 6, "code": 2}),
        ("service: {}", "", {"math": 8}),
    ):
        cluster = "cluster={trainer: 8, teacher: 8, rollout: 8}"
        recipe = read_recipe(SMALL, [*two(math, code), SHARES, cluster, "rollout.servers.start=4"])
        roles = {role.name: role.gpus for role in plan(recipe).roles}
        jobs = {role.name: role.processes for role in job(recipe).roles}
        for source, count in gpus.items():
            assert roles[f"teachers.{source}"] == jobs[f"teacher-{source}"] == count


def job(recipe):
    return make_job(recipe, PROFILE, Path("launch"))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (two(SERVED_BIG, SERVED_DENSE), "sum to 3, which differs .* write cluster.teacher=3"),
        (two("service: {}", "service: {processes: 8}"), "leaves 0 GPUs for teachers.math"),
        (two("service: {}", "service: {processes: 3}") + ["teachers.third={hf: x, service: {}}"],
         "leaves 5 GPUs for teachers.math and teachers.third, which cannot share them evenly"),
        (two("service: {parallel: {ep: 8}}", "service: {}"),
         "teachers.math.service.processes=4 is not a multiple of 8, what the layout ep8"),
        (two(), "no teacher has one; add teacher.service"),
    ],
)  # fmt: skip
def test_launcher_and_planner_refuse_the_same_services(words, sentence):
    cluster = ["cluster={trainer: 8, teacher: 8, rollout: 8}", "rollout.servers.start=4"]
    recipe = read_recipe(SMALL, [*words, *cluster])
    for ask in (plan, job):
        with pytest.raises(RecipeError, match=sentence):
            ask(recipe)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            [
                "teacher=null",
                f"teachers.math={{hf: {BIG}, service: {{}}}}",
                "data.train=[{name: eurus_code}]",
            ],
            "add teachers.code",
        ),
        (
            [*two(SERVED_BIG, "service: {processes: 12}"), "cluster.teacher=14"],
            "teachers.code.service.processes=12 does not fill whole nodes",
        ),
    ],
)
def test_refused(words, sentence):
    with pytest.raises(RecipeError, match=sentence):
        planned(*words)


def test_services_without_gpus_get_the_fewest():
    found = planned(*two(SERVED_BIG, SERVED_DENSE), "cluster.teacher=0")
    assert found.setup.services == {
        key: service.world for key, service in found.setup.recipe.services.items()
    }
    (said,) = found.setup.said
    assert said.startswith("cluster.teacher=") and "teachers.math.service" in said
    assert said in notes(found)


@pytest.mark.parametrize(
    ("teacher", "parts"), [(1, [1, 0]), (3, [2, 1]), (8, [5, 3]), (16, [8, 8]), (24, [16, 8])]
)
def test_services_keep_about_their_proportion_on_other_gpus(teacher, parts):
    setup = planned(*SERVICES, *two(SERVED_BIG, SERVED_DENSE)).setup
    cluster = setup.cluster.model_copy(update={"trainer": 7, "teacher": teacher, "rollout": 9})
    assert list(setup.divided(cluster).values()) == [7, *parts, 9]


def test_search_gives_every_service_its_part():
    now = planned(*SERVICES, *two(SERVED_BIG, SERVED_DENSE))
    found = search(now, 24)
    assert found and found[0].fits
    assert {tuple(p.setup.services.values()) for p in found} == {(5, 3)}
    words = [word.replace("'", "") for word in overrides(found[0])]
    again = planned(*SERVICES, *two(SERVED_BIG, SERVED_DENSE), *words)
    assert again.gpus == 24 and again.seconds == pytest.approx(found[0].seconds)


def test_another_node_is_asked_of_every_service():
    found = planned(*SERVICES, *two(SERVED_BIG, SERVED_DENSE)).another_node()
    assert list(found) == ["trainer", "teachers.math", "teachers.code", "rollout"]


def test_command_and_picture_name_every_teacher(tmp_path):
    file = tmp_path / "plan.png"
    served = [str(SMALL), *SERVICES, *two(SERVED_BIG, SERVED_DENSE)]
    found = CliRunner().invoke(app, ["plan", *served, "--json", "--picture", str(file)])
    figures = json.loads(found.stdout)
    assert {"teachers.math", "teachers.code"} < set(figures["roles"])
    assert figures["teachers"]["teachers.math"]["share"] == 0.75
    assert not figures["teachers"]["teachers.math"]["share_is_assumed"]
    assert file.stat().st_size > 20_000
    text = CliRunner(env={"COLUMNS": "300"}).invoke(app, ["plan", *served, "--search"]).stdout
    assert "teachers.math 1: dp1, teachers.code 1: dp1" in text and "scoring teachers.code" in text
    file = tmp_path / "embedded.png"
    embedded = [str(SMALL), *EMBEDDED, *two(), "--json", "--picture", str(file)]
    figures = json.loads(CliRunner().invoke(app, ["plan", *embedded]).stdout)
    assert figures["roles"]["trainer"]["memory"]["teachers.code"] == DENSE_BYTES
    assert file.stat().st_size > 20_000
    words = ["plan", *embedded[:-3]]
    assert "│ teachers.code" in CliRunner().invoke(app, words).stdout


def test_overrides_say_how_services_are_laid_out():
    words = overrides(
        planned(*SERVICES, *two(f"{SERVED_BIG[:-1]}, parallel: {{ep: 2}}}}", SERVED_DENSE))
    )
    assert "teachers.math.service.parallel='{ep: 2}'" in words
    assert "teachers.code.service.processes=1" in words


def test_launch_gives_a_verdict(capsys):
    recipe = read_recipe(SMALL, [*SERVICES, *two(SERVED_BIG, SERVED_DENSE)])
    print_roles(job(recipe), recipe, PROFILE, with_commands=False)
    assert "plan: fits h100-80" in capsys.readouterr().out
