"""Servers that die, hang, cut off or come back with old weights: every prompt is answered once.

Real processes, real signals; the servers' keeper starts again what was killed.
"""

import os
import signal
import socket
import threading
import time

import pytest
from served_models import hf_logp, largest, prompts
from support import Rig

from iwopd_megatron.rollout.engine import Sampling

STUDENT = "recipes/demo/student"
SAMPLING = Sampling(100)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two servers of the MoE model."""
    from served_models import ROOT

    with Rig(ROOT / STUDENT, tmp_path_factory.mktemp("pair"), 2) as rig:
        yield rig


def rounds_of(engine, asked, disturb, sampling=SAMPLING):
    """Generate for `asked`; once a few answers are there, `disturb()`. All answers, checked."""
    seen = []

    def on_sample(sample):
        seen.append(sample.index)
        if len(seen) == 3:
            threading.Thread(target=disturb).start()

    samples = engine.generate(asked, sampling, on_sample)
    assert sorted(seen) == [prompt.index for prompt in asked], "lost or answered twice"
    assert [sample.index for sample in samples] == [prompt.index for prompt in asked]
    return samples


def check_written_by(rig, weights, samples):
    model = rig.model(weights)
    for sample in samples[::8]:
        ids = sample.prompt_ids + sample.response_ids
        assert largest(hf_logp(model, ids, len(sample.prompt_ids)), sample.rollout_logp) < 1e-4


def kill(process):
    os.killpg(process.process.pid, signal.SIGKILL)


@pytest.mark.parametrize("sync", ["disk", "tensor"])
def test_one_of_two_servers_is_killed_while_generating(pair, sync):
    said = []
    engine, weights = pair.engine(sync, said.append, max_running=16), pair.weights(seed=3)
    engine.update(weights.items(), 7)
    samples = rounds_of(engine, prompts(200), lambda: kill(pair.processes[0]))
    check_written_by(pair, weights, samples)
    assert any("rollout server lost" in line for line in said)
    pair.run(pair.controller.pool.settle())
    newer = pair.weights(seed=4)
    engine.update(newer.items(), 8)  # the one that came back has it too
    assert [replica.version for replica in pair.controller.pool.replicas] == [8, 8]
    check_written_by(pair, newer, engine.generate(prompts(16), SAMPLING))


@pytest.mark.parametrize("sync", ["disk", "tensor"])
def test_the_only_server_is_killed_while_generating(moe, sync):
    """From a folder it takes the weights up alone; otherwise all ranks push them again."""
    engine, weights = moe.engine(sync, max_running=16), moe.weights(seed=3)
    engine.update(weights.items(), 7)
    samples = rounds_of(engine, prompts(120), lambda: kill(moe.processes[0]))
    check_written_by(moe, weights, samples)


def test_a_server_that_hangs_is_given_up(pair):
    """Stopped by SIGSTOP it keeps its connections; the others answer its prompts."""
    engine, weights = pair.engine("tensor", max_running=16), pair.weights(seed=3)
    engine.update(weights.items(), 7)
    group = pair.processes[1].process.pid
    samples = rounds_of(engine, prompts(120), lambda: os.killpg(group, signal.SIGSTOP))
    check_written_by(pair, weights, samples)
    pair.run(pair.controller.pool.settle())
    assert all(replica.is_up for replica in pair.controller.pool.replicas)


@pytest.mark.parametrize("sync", ["disk", "tensor", "distributed"])
def test_a_server_killed_in_the_middle_of_an_update_serves_nothing_half_updated(pair, sync):
    engine, weights = pair.engine(sync), pair.weights(seed=6)
    engine.update(pair.weights(seed=5).items(), 1)

    def cut_short():
        for number, item in enumerate(weights.items()):
            if number == len(weights) // 2 and not cut_short.is_done:
                cut_short.is_done = True
                kill(pair.processes[0])
            yield item

    cut_short.is_done = False

    class Weights:
        def __iter__(self):
            return cut_short()

    import iwopd_megatron.rollout.servers as servers

    split, servers.named_buckets = servers.named_buckets, lambda w: ([item] for item in w)
    try:
        engine.update(Weights(), 2)
    finally:
        servers.named_buckets = split
    pair.run(pair.controller.pool.settle())
    samples = engine.generate(prompts(40), SAMPLING)
    assert {sample.weight_version for sample in samples} == {2}
    check_written_by(pair, weights, samples)


def test_a_server_restarted_with_old_weights_behind_our_back_is_noticed(moe):
    """Its label says so; its answers are thrown away, and it gets the weights again."""
    said = []
    engine, weights = moe.engine("tensor", said.append), moe.weights(seed=3)
    engine.update(weights.items(), 7)
    kill(moe.processes[0])
    moe.run(_gone_and_back(moe.server))
    samples = engine.generate(prompts(16), SAMPLING)
    check_written_by(moe, weights, samples)
    assert any("answered under weights ['default']" in line for line in said)


async def _gone_and_back(server):
    import asyncio

    while await server.is_alive():
        await asyncio.sleep(0.1)
    await server.wait_ready()


def test_connections_cut_in_the_middle_of_an_answer_are_asked_again(moe):
    """Through a proxy that closes every third connection after a few bytes of the answer."""
    engine, weights = moe.engine("tensor"), moe.weights(seed=3)
    engine.update(weights.items(), 7)
    url = moe.server.url
    with Cutter(int(url.rsplit(":", 1)[1])) as proxy:
        moe.server.url = f"http://127.0.0.1:{proxy.port}"
        try:
            samples = rounds_of(engine, prompts(30), lambda: None)
        finally:
            moe.server.url = url
    assert proxy.cut > 3
    check_written_by(moe, weights, samples)


class Cutter:
    """A proxy to a port of this machine that cuts every third connection in mid-answer."""

    def __init__(self, target: int):
        self.target, self.cut, self.count = target, 0, 0

    def __enter__(self):
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.listener.close()

    def _accept(self):
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            self.count += 1
            threading.Thread(target=self._serve, args=(client, self.count % 3 == 0)).start()

    def _serve(self, client, is_cut):
        with client, socket.create_connection(("127.0.0.1", self.target)) as server:
            forward = threading.Thread(target=_copy, args=(client, server), daemon=True)
            forward.start()
            if not is_cut:
                _copy(server, client)
                return
            client.sendall(server.recv(40))
            self.cut += 1
            time.sleep(0.05)
            client.shutdown(socket.SHUT_RDWR)  # a close alone waits for the other thread's recv


def _copy(source, sink):
    try:
        while data := source.recv(65536):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)
    except OSError:
        pass
