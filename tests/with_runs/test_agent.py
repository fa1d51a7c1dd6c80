"""What agents do when roles start, die, hang, are told to stop, and end."""

import os
import signal
import time
from pathlib import Path

import pytest
from agents import Agents, service, starts, told, trainer, until

from iwopd_megatron.launch.roles import Role


@pytest.fixture
def agents(tmp_path):
    made = []

    def make(*roles: Role, requeues: int = 0) -> Agents:
        made.append(Agents(tmp_path, *roles, requeues=requeues))
        return made[-1]

    yield make
    for one in made:
        one.end(tmp_path)


def test_trainer_waits_for_services_and_learns_their_addresses(agents, tmp_path):
    roles = [
        trainer(tmp_path, processes=4, per_node=2),
        service(tmp_path, "teacher"),
        service(tmp_path, "rollout", processes=2, per_node=2, is_world=False),
    ]
    job = agents(*roles)
    trainers = [job.start("trainer", "--node", str(node)) for node in (0, 1)]
    until(lambda: job.status("trainer").get("detail") == "for teacher 0")
    assert not (tmp_path / "rank_0").exists()
    (tmp_path / "loading").touch()
    teacher = job.start("teacher")
    until(lambda: starts(tmp_path))
    rollout = job.start("rollout")
    until(lambda: len(starts(tmp_path)) == 3)
    assert job.status("trainer")["detail"] == "for teacher 0"
    (tmp_path / "loading").unlink()
    ranks = [told(tmp_path, rank) for rank in range(4)]
    assert len({rank["env"]["MASTER_PORT"] for rank in ranks}) == 1
    assert [rank["env"]["LOCAL_RANK"] for rank in ranks] == ["0", "1", "0", "1"]
    given = dict(word.split("=") for word in ranks[3]["arguments"])
    assert given["teacher.urls"].startswith("[http://")
    assert given["rollout.urls"].count("http://") == 2
    (tmp_path / "go").write_text("0")
    assert [p.wait(60) for p in (*trainers, teacher, rollout)] == [0, 0, 0, 0]
    until(lambda: job.status("teacher").get("state") == "done")


def test_service_that_never_gets_ready_is_named(agents, tmp_path):
    roles = [trainer(tmp_path), service(tmp_path, "teacher", ready_timeout_s=1)]
    job = agents(*roles)
    assert job.start("trainer").wait(60) == 4
    assert "teacher 0 of 1 is not ready after 1 seconds (no node has said where" in job.log()


def test_world_over_two_nodes_restarts_together(agents, tmp_path):
    roles = [trainer(tmp_path), service(tmp_path, "teacher", processes=2, per_node=1)]
    job = agents(*roles)
    nodes = [job.start("teacher", "--node", str(node)) for node in (0, 1)]
    until(lambda: job.status("teacher").get("state") == "ready")
    first = job.rendezvous.read("teacher.world_0")["port"]
    os.kill(int(starts(tmp_path)[0][1]), signal.SIGKILL)
    until(lambda: len(starts(tmp_path)) == 2 and job.status("teacher").get("restarts") == 1)
    until(lambda: job.status("teacher", 1).get("restarts") == 1)
    assert job.rendezvous.read("teacher.world_1")["port"] != first
    assert all(node.poll() is None for node in nodes)


def test_service_that_keeps_dying_ends_the_job(agents, tmp_path):
    job = agents(trainer(tmp_path), service(tmp_path, "teacher", max_restarts=1))
    teacher, train = job.start("teacher"), job.start("trainer")
    told(tmp_path, 0)
    for count in (1, 2):
        until(lambda count=count: len(starts(tmp_path)) == count)
        until(
            lambda count=count: (
                job.status("teacher")
                == job.status("teacher") | {"state": "ready", "restarts": count - 1}
            )
        )
        os.kill(int(starts(tmp_path)[-1][1]), signal.SIGKILL)
    assert teacher.wait(60) == train.wait(60) == 128 + signal.SIGKILL


def test_servers_restart_one_by_one(agents, tmp_path):
    rollout = service(tmp_path, "rollout", processes=2, per_node=2, is_world=False)
    job = agents(trainer(tmp_path), rollout)
    job.start("rollout")
    until(lambda: job.status("rollout").get("state") == "ready")
    os.kill(int(starts(tmp_path)[0][1]), signal.SIGKILL)
    until(lambda: len(starts(tmp_path)) == 3)
    until(lambda: job.status("rollout").get("restarts") == 1)


@pytest.mark.parametrize("is_world", [True, False])
def test_busy_service_is_not_taken_for_a_hung_one(agents, tmp_path, is_world):
    """SGLang's /health hangs while weights change, and probes give up after 5 seconds."""
    role = service(tmp_path, "teacher", is_world=is_world, hang_timeout_s=1)
    job = agents(trainer(tmp_path), role)
    job.start("teacher")
    until(lambda: job.status("teacher").get("state") == "ready")
    (tmp_path / "busy").touch()
    time.sleep(7)  # a probe
    assert "restart 1 of" not in job.log()
    os.kill(int(starts(tmp_path)[0][1]), signal.SIGSTOP)
    (tmp_path / "busy").unlink()
    until(lambda: len(starts(tmp_path)) == 2)


def test_warning_stops_the_trainer_and_nothing_else(agents, tmp_path):
    job = agents(trainer(tmp_path), service(tmp_path, "teacher"))
    teacher, train = job.start("teacher"), job.start("trainer")
    told(tmp_path, 1)
    (job.rendezvous.folder / "stop").touch()
    assert train.wait(60) == 75
    assert teacher.wait(60) == 75  # the job's code, once the trainer has decided it
    assert "asks its ranks to save and stop" in job.log()
    assert job.log().count("asks its ranks") == 1


@pytest.mark.parametrize(("code", "final"), [(2, True), (3, True), (1, False), (4, False)])
def test_what_only_a_person_can_mend_is_final(agents, tmp_path, code, final):
    job = agents(trainer(tmp_path))
    (tmp_path / "go").write_text(str(code))
    assert job.start("trainer").wait(60) == code
    assert (tmp_path / "launch" / "final.txt").exists() is final


def test_machine_runs_all_roles_and_starts_them_again(agents, tmp_path):
    job = agents(trainer(tmp_path), service(tmp_path, "teacher"), requeues=1)
    machine = job.start("machine")
    os.kill(told(tmp_path, 0)["pid"], signal.SIGKILL)
    until(lambda: "attempt 1 of 1 begins" in job.log())
    (tmp_path / "go").write_text("0")
    assert machine.wait(60) == 0
    assert len(starts(tmp_path)) == 2


def test_nothing_outlives_a_killed_machine(agents, tmp_path):
    job = agents(trainer(tmp_path), service(tmp_path, "teacher"))
    machine = job.start("machine")
    told(tmp_path, 1)
    children = Path(f"/proc/{machine.pid}/task/{machine.pid}/children").read_text().split()
    assert len(children) == 2
    machine.kill()
    machine.wait()
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in children))


def test_machine_asked_to_stop_does_not_begin_again(agents, tmp_path):
    job = agents(trainer(tmp_path), service(tmp_path, "teacher"), requeues=5)
    machine = job.start("machine")
    told(tmp_path, 1)
    machine.send_signal(signal.SIGTERM)
    assert machine.wait(60) == 75
    assert "begins" not in job.log()
