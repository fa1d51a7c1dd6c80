"""A whole run rehearsed on tensors without memory: against a real run, and with planted faults."""

import io
import json
import pickle
import re
import tempfile
from collections import Counter, deque
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from rich.console import Console
from worlds import run_world

from iwopd_megatron.config.load import read_recipe
from iwopd_megatron.config.models import Layout
from iwopd_megatron.config.recipe import Recipe
from iwopd_megatron.hf.config import parse_hf_config
from iwopd_megatron.hf.families import FAMILIES
from iwopd_megatron.loss import linear_loss, logprobs
from iwopd_megatron.models import experts
from iwopd_megatron.models.gpt import build_model
from iwopd_megatron.plan.hardware import GPUS, RATES
from iwopd_megatron.plan.memory import push_bytes
from iwopd_megatron.plan.model_size import ModelSize
from iwopd_megatron.plan.plan import Plan
from iwopd_megatron.rehearsal import checkpoints, costs, full, resharding, slices
from iwopd_megatron.rehearsal import table as table_of_rehearsal
from iwopd_megatron.rehearsal.collectives import Call, Mailbox, Recorder
from iwopd_megatron.rehearsal.job import Job, jobs
from iwopd_megatron.rehearsal.ledger import Ledger
from iwopd_megatron.rehearsal.memoryless import Memoryless, Shapes, Watched
from iwopd_megatron.rehearsal.place import Place, covering, places, read_ranks
from iwopd_megatron.rehearsal.push import introduce, pushed
from iwopd_megatron.rehearsal.rank import RankRehearsal
from iwopd_megatron.rehearsal.replay import compare, play, program_of
from iwopd_megatron.rehearsal.role import RoleRehearsal
from iwopd_megatron.rehearsal.routing import expert_counts
from iwopd_megatron.rehearsal.sources import HollowFolder
from iwopd_megatron.rehearsal.world import Groups, alone
from iwopd_megatron.runtime.device import as_gpu
from iwopd_megatron.runtime.megatron import nested_values
from iwopd_megatron.runtime.parallel import initialise, shutdown
from iwopd_megatron.teacher import embedded
from iwopd_megatron.train import checkpoint
from iwopd_megatron.train.student import StudentModel
from iwopd_megatron.weights import sharding, table
from iwopd_megatron.weights.hf_reader import HfTensors, load_shards
from iwopd_megatron.weights.sync import WeightStream

RECIPE = Path(__file__).parents[2] / "recipes/demo_tiny_moe.yaml"
LAYOUTS = {
    "tp2 ep2 cp2": dict(tp=2, ep=2, cp=2),
    "pp2 ep2": dict(pp=2, ep=2),
    "pp2 vpp2 tp2": dict(pp=2, vpp=2, tp=2),
    "tp2 ep2 etp2": dict(tp=2, ep=2, etp=2),
}
SERVERS = (
    "rollout.engine=sglang",
    "rollout.sync=distributed",
    "rollout.servers.start=1",
    "cluster.rollout=1",
)
pytestmark = pytest.mark.usefixtures("in_the_repository")


def job_of(world: int, axes: dict[str, int], *changes: str) -> Job:
    layout = ", ".join(f"{name}: {size}" for name, size in axes.items())
    given = [f"student.parallel={{{layout}}}", f"cluster={{trainer: {world}}}"]
    recipe = read_recipe(RECIPE, [*given, "train.microbatch_tokens=256", *changes])
    return jobs(recipe)[1][0]


def rehearsal_of(job: Job, mailbox: Mailbox | None = None, **more) -> RankRehearsal:
    return RankRehearsal(job, GPUS["h100-80"], RATES, mailbox, **more)


def told(run) -> dict:
    """What is compared of a rank: its calls without their lines, and bytes by phase."""
    calls = {
        phase: [[*vars(call).values()][:5] + [call.peer, call.sent, call.received] for call in own]
        for phase, own in run.calls.items()
    }
    peaks = {name: [phase.peak, sum(phase.after.values())] for name, phase in run.memory.items()}
    return json.loads(json.dumps({"calls": calls, "peaks": peaks}))


def forked(function, *args):
    """Return what a function returns in a fork of this process.

    Where tensors without memory went backward, torch starts threads, and forks no more.
    """
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result"
        run_world(1, _written, result, function, *args)
        return pickle.loads(result.read_bytes())


def _written(file: Path, function, *args) -> None:
    file.write_bytes(pickle.dumps(function(*args)))


def real_rank(job: Job, out: Path) -> None:
    """Do a rehearsal's phases for real, over gloo, and write down what was seen."""
    parallel = initialise(job.layout)
    own = rehearsal_of(job, folder=lambda hf, folder: HfTensors(folder))
    run = own.perform(parallel, Watched, Recorder(is_alone=False))
    (out / f"{parallel.rank}.json").write_text(json.dumps(told(run)))
    shutdown()


def rehearsed_rank(job: Job, rank: int) -> dict:
    """Rehearse a rank as the CPU runs it."""
    mailbox = Mailbox(job.world // job.layout.pp)
    introduce(job, mailbox)
    with alone(rank, job.world, job.layout) as parallel:
        own = rehearsal_of(job, folder=lambda hf, _: HollowFolder(hf, torch.float32))
        return told(own.perform(parallel, Memoryless, Recorder(True, mailbox)))


def objects(call: list) -> bool:
    """Whether a call is of pickled objects, whose sizes a rank alone does not know."""
    return call[0] in ("all_gather", "broadcast") and call[4] == "uint8"


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_real_run_says_and_holds_what_was_rehearsed(name, tmp_path, moe_folder, monkeypatch):
    """Calls are the same, with groups, bytes, dtypes and peers; live bytes within 2 percent."""
    # Frozen weights stay in their file on a CPU, as on no GPU.
    monkeypatch.setattr(embedded, "load_shards", lambda *given, frozen: load_shards(*given))
    folders = f"student.hf={moe_folder}", f"teacher.hf={moe_folder}"
    job = job_of(4, LAYOUTS[name], *folders, *SERVERS)
    run_world(4, real_rank, job, tmp_path)
    for rank in range(4):
        real = json.loads((tmp_path / f"{rank}.json").read_text())
        ours = forked(rehearsed_rank, job, rank)
        assert ours["calls"].keys() == real["calls"].keys()
        for phase, calls in real["calls"].items():
            said = [x for x in ours["calls"][phase] if not objects(x)]
            assert said == [x for x in calls if not objects(x)], (rank, phase)
        assert any(call[3] for calls in real["calls"].values() for call in calls)
        calls = [call for own in real["calls"].values() for call in own]
        sent = max((call[3] for call in calls if call[0] == "send"), default=0)  # held on its way
        for phase, sizes in real["peaks"].items():
            assert ours["peaks"][phase] == pytest.approx(sizes, rel=0.02, abs=2 * sent), (
                rank,
                phase,
            )


@pytest.fixture(scope="module")
def small():
    """A job of eight ranks, of one layer a chunk."""
    return job_of(8, dict(tp=2, pp=2, ep=2)).with_layers(1)


def report_of(job: Job, all_layers: bool = True, short: bool = True):
    return forked(_report, job, all_layers, short)


def _report(job: Job, all_layers: bool, short: bool):
    plan, _ = jobs(job.recipe)
    return RoleRehearsal(job, plan, all_layers, short).run()


def test_nothing_is_found_where_nothing_is_wrong(small):
    report = report_of(small)
    assert [x for x in report.findings if "the plan has" not in x] == []
    assert report.slices.ranks == 8
    assert report.peak > 0


def test_a_step_moves_what_the_plan_says():
    """Gradients are scattered and parameters gathered once, experts' over their own ranks."""
    report = report_of(job_of(8, dict(tp=2, ep=2), "student.dtype=bf16"))
    for axis in ("dp", "expert dp"):
        rehearsed, planned = report.moved[axis]
        assert 0 < planned == pytest.approx(rehearsed, rel=0.02), axis


KINDS = [(0, dict(pp=2, ep=2)), (3, dict(pp=2, ep=2))]


@pytest.mark.parametrize(("dense", "axes"), KINDS, ids=str)
def test_figures_are_linear_in_the_layers_of_each_kind(dense, axes):
    """Small models say what all six layers of a stage take: bytes, calls and seconds."""
    job = job_of(4, axes, "student.recompute=full", "student.dtype=bf16")
    if dense:
        own = {"model_type": "glm4_moe", "n_group": 1, "first_k_dense_replace": dense}
        sizes = FAMILIES["glm4_moe"].sample | {"num_hidden_layers": 6, "vocab_size": 16}
        sizes |= {"pad_token_id": 0, "tie_word_embeddings": False}
        job = replace(job, hf=parse_hf_config({**sizes, **own}, "dense first"))
    job = job.with_layers(6)
    whole, small = (
        report_of(job, all_layers, short=not all_layers) for all_layers in (True, False)
    )
    assert whole.hot[2.0] > whole.peak
    assert [x for x in whole.findings + small.findings if "the plan has" not in x] == []
    assert small.peak == pytest.approx(whole.peak, rel=0.01)
    assert small.kept == pytest.approx(whole.kept, rel=0.01)
    for phase, calls in whole.volumes.items():
        for what, figures in calls.items():
            assert small.volumes[phase][what] == pytest.approx(figures, rel=0.01), (phase, what)
    assert small.seconds == pytest.approx(whole.seconds, rel=0.01)


def with_row(monkeypatch, name: str, cut) -> None:
    """Cut the parameter of that name in another way."""
    rows = dict(table._rows("qwen3_moe"))
    row, own = rows[name]
    rows[name] = row, "PLANTED"
    monkeypatch.setattr(table, "_rows", lambda model_type: rows)
    monkeypatch.setitem(table.SHARDINGS, "PLANTED", replace(table.SHARDINGS[own], shard=cut))


def test_a_slice_of_the_neighbours_rows_is_found(small, monkeypatch):
    def neighbours(sources, rank, size, hf):
        return sharding._rows(sources[0], (rank + 1) % size, size)

    with_row(monkeypatch, "embedding.word_embeddings.weight", neighbours)
    found = slices.read_slices(small).findings
    assert any("model.embed_tokens.weight, where its place, 0 of 2" in x for x in found)


def test_a_tensor_read_by_nobody_is_found(small, monkeypatch):
    names = [f"decoder.layers.{{layer}}.self_attention.{x}_layernorm.weight" for x in "qk"]
    rows = dict(table._rows("qwen3_moe"))
    rows[names[0]] = replace(rows[names[0]][0], tensors=rows[names[1]][0].tensors), "REPLICATED"
    monkeypatch.setattr(table, "_rows", lambda model_type: rows)
    found = slices.read_slices(small)
    assert any("self_attn.q_norm.weight is read by nobody" in x for x in found.gaps)


def test_a_swapped_expert_range_is_found(small, monkeypatch):
    init = experts.GroupedMoELayer.__init__

    def swapped(self, *args, **more):
        init(self, *args, **more)
        count = self.config.num_moe_experts
        self.local_expert_indices = [(i + count // 2) % count for i in self.local_expert_indices]

    monkeypatch.setattr(experts.GroupedMoELayer, "__init__", swapped)
    found = slices.read_slices(small).findings
    assert any("an expert of expert-parallel rank 1, and is 0" in x for x in found)


def programs(job: Job, ranks=None, hot: float = 1.0) -> dict[int, list[Call]]:
    ranks = ranks or [place.rank for place in covering(job.world, job.layout)]
    return forked(_programs, job, ranks, hot)


def _programs(job: Job, ranks: list[int], hot: float) -> dict[int, list[Call]]:
    mailbox = Mailbox(job.world // job.layout.pp)
    introduce(job, mailbox)
    return {rank: rehearsal_of(job, mailbox).run(rank, hot).program for rank in ranks}


def test_a_missing_send_is_named(small):
    said = programs(small)
    assert play(said) == []
    calls = said[4]
    del calls[next(i for i, call in enumerate(calls) if call.operation == "send")]
    found = play(said)
    assert any("rank 0 waits for ever for rank 4's message" in x for x in found)


STAGES = {
    "interleaved": dict(pp=2, vpp=2, tp=2),
    "uneven": dict(pp=4, num_layers_in_first_pipeline_stage=1, num_layers_in_last_pipeline_stage=1),
    "interleaved and uneven": dict(pp=2, vpp=2, pipeline_model_parallel_layout="E|t*5|t*2|tL"),
}


def staged(name: str) -> Job:
    """A job of eight layers in these stages, as they are."""
    layout = Layout(**STAGES[name])
    job = job_of(4, dict(pp=2), "cluster.teacher=1", "teacher.service.processes=1")
    return replace(job, layout=layout, hf=replace(job.hf, num_hidden_layers=8))


@pytest.mark.parametrize("name", STAGES)
def test_messages_have_one_size_at_both_ends(name):
    """Every receive's bytes and dtype are its send's; each is a micro-batch's hidden states."""
    job = staged(name)
    said = programs(job)
    assert play(said) == []
    calls = [(rank, call) for rank, own in said.items() for call in own]
    given = Counter((rank, x.peer, x.nbytes) for rank, x in calls if x.operation == "send")
    taken = Counter((x.peer, rank, x.nbytes) for rank, x in calls if x.operation == "receive")
    assert given == taken
    hidden = job.tokens * job.hf.hidden_size * 4 // job.layout.tp  # fp32
    assert {nbytes for _, _, nbytes in given} == {hidden}
    between = job.layout.pp * job.layout.vpp - 1  # chunks, there and back
    assert given.total() == 2 * between * job.microbatches * job.world // job.layout.pp


@pytest.mark.parametrize("name", STAGES)
def test_a_message_of_another_size_is_found(name, monkeypatch):
    """The first stage sends one number fewer than the second one makes room for."""
    job, isend = staged(name), dist.isend
    whole = job.tokens * job.hf.hidden_size * 4 // job.layout.tp

    def shorter(tensor, *place, **more):
        if dist.get_rank() == 0 and tensor.nbytes == whole:
            tensor = tensor.flatten()[:-1]
        return isend(tensor, *place, **more)

    for module in (dist, dist.distributed_c10d):
        monkeypatch.setattr(module, "isend", shorter)
    found = play(programs(job))
    assert any(
        f"rank 0 sends {whole - 4} bytes of float32" in x and f"which receives {whole} of" in x
        for x in found
    )


def test_a_branch_on_local_tokens_is_found(monkeypatch):
    """One of two ranks, the one with more tokens, asks all whether it has too many."""
    job = job_of(4, dict(ep=2)).with_layers(1)
    forward = experts.GroupedExperts.forward

    def asking(self, hidden, tokens_per_expert, probs):
        if int(tokens_per_expert.sum()) > 300:
            dist.all_reduce(torch.ones(1, dtype=torch.int64), group=self.ep_group)
        return forward(self, hidden, tokens_per_expert, probs)

    monkeypatch.setattr(experts.GroupedExperts, "forward", asking)
    said = programs(job, [0, 1], hot=1.5)
    tokens = [call.sent for call in said[0] if call.operation == "all_to_all"]
    assert tokens[0][0] > tokens[0][1]  # the first rank's experts are hot
    found = compare(said) + play(said)
    assert any("EXPERT_MODEL_PARALLEL_GROUP [0, 1]: call" in x for x in found)
    assert any("waits for ever in" in x for x in found)


def test_an_all_reduce_over_the_wrong_group_is_found(small, monkeypatch):
    """A sum over data-parallel ranks where tensor-parallel ones are meant, on one of them."""
    step = StudentModel.step

    def wrong(self):
        p = self.parallel
        dist.all_reduce(torch.ones(1), group=(p.dp if p.tp.rank else p.tp).group)
        return step(self)

    monkeypatch.setattr(StudentModel, "step", wrong)
    found = compare(programs(small))
    assert any("TENSOR_MODEL_PARALLEL_GROUP [0, 1]" in x for x in found)


def test_an_activation_kept_by_a_global_is_named(small, monkeypatch):
    kept = []
    forward = experts.GroupedExperts.forward

    def keeping(self, hidden, tokens_per_expert, probs):
        out = forward(self, hidden, tokens_per_expert, probs)
        kept.append(out[0])
        return out

    monkeypatch.setattr(experts.GroupedExperts, "forward", keeping)
    found = report_of(small).findings
    assert any("are still there afterwards" in x and "GiB" in x for x in found)
    assert any("experts.py" in x or "native_ops.py" in x for x in found)


def test_a_tile_that_ignores_the_budget_is_found(monkeypatch):
    job = job_of(2, dict(ep=2)).with_layers(1)
    job = replace(job, hf=replace(job.hf, vocab_size=65536), tokens=8192)
    peak = report_of(job).peak
    for module in (logprobs, linear_loss):
        monkeypatch.setattr(module, "default_tile", lambda topk=0: (2**20, 2**20))
    report = report_of(job)
    assert report.peak > 1.5 * peak
    assert any("loss/" in x and "the plan has" in x for x in report.findings)


def test_pieces_of_a_checkpoint_that_do_not_tile_are_found():
    def piece(first, rows, is_written=True):
        return checkpoints.Piece("w", (8, 4), torch.float32, (first, 0), (rows, 4), is_written)

    assert checkpoints.check_pieces([piece(0, 4), piece(4, 4), piece(4, 4, False)]) == []
    assert "16 of 32" in checkpoints.check_pieces([piece(0, 4)])[0]
    assert "twice" in checkpoints.check_pieces([piece(0, 4), piece(0, 4)])[0]
    assert "nobody" in checkpoints.check_pieces([piece(0, 8), piece(4, 4, False)])[0]


def test_pieces_that_a_layout_asks_for_are_among_the_saved_once():
    def piece(key, first, shape, is_written=True):
        return checkpoints.Piece(key, (2, 8, 4), torch.float32, first, shape, is_written)

    halves = [piece("w", (i, 4 * j, 0), (1, 4, 4)) for i in range(2) for j in range(2)]
    whole, columns = piece("w", (0, 0, 0), (2, 8, 4)), piece("w", (1, 0, 2), (1, 8, 2))
    assert checkpoints.check_load([whole, columns], halves) == []
    assert "16 elements, 8 are saved" in checkpoints.check_load([columns], halves[:3])[0]
    assert "16 elements, 24 are saved" in checkpoints.check_load([columns], [*halves, halves[3]])[0]
    copies = [replace(half, is_written=False) for half in halves]
    assert "not saved" in checkpoints.check_load([whole], copies)[0]
    other = replace(whole, dtype=torch.bfloat16)
    assert "as torch.bfloat16" in checkpoints.check_load([other], halves)[0]


def checkpoint_of(job: Job) -> list[str]:
    return resharding.check_checkpoints(job, resharding.others(job))


def test_states_that_a_rank_leaves_out_are_found(small, monkeypatch):
    """On a rank of which nothing else is rehearsed."""
    assert 3 not in [place.rank for place in covering(small.world, small.layout)]
    state = checkpoint.sharded_state

    def without(chunks, optimizer, parallel, is_loading):
        whole = state(chunks, optimizer, parallel, is_loading)
        if parallel.rank == 3 and not is_loading:
            del whole["optimizer"]
        return whole

    monkeypatch.setattr(checkpoint, "sharded_state", without)
    found = forked(checkpoint_of, small)
    assert any("rank 3" in x and "has 0 states" in x for x in found) or any(
        "3 states" in x for x in found
    )


def test_a_layout_that_asks_for_other_names_is_found(small, monkeypatch):
    state = checkpoint.sharded_state

    def renamed(chunks, optimizer, parallel, is_loading):
        whole = state(chunks, optimizer, parallel, is_loading)
        if is_loading and parallel.tp.size == 2:
            for piece in nested_values(whole["model0"]):
                piece.key = piece.key.replace("q_layernorm", "query_norm")
        return whole

    monkeypatch.setattr(checkpoint, "sharded_state", renamed)
    found = forked(checkpoint_of, small)
    assert found
    assert all("tp2" in x and "query_norm.weight is asked for and not saved" in x for x in found)


def test_a_layout_of_ones_own_loads_the_checkpoint(monkeypatch):
    """Of the whole model, here eight layers; a name that only its fourth stage asks for is told."""
    state = checkpoint.sharded_state

    def renamed(chunks, optimizer, parallel, is_loading):
        whole = state(chunks, optimizer, parallel, is_loading)
        if is_loading and parallel.pp.rank == 3:
            for piece in nested_values(whole["model0"]):
                piece.key = piece.key.replace("final_layernorm", "last_norm")
        return whole

    job = job_of(2, dict(ep=2))
    job = replace(job, hf=replace(job.hf, num_hidden_layers=8))
    layout = Layout(pp=4, ep=2)
    assert forked(_read_by, job, layout) == ([], True)
    monkeypatch.setattr(checkpoint, "sharded_state", renamed)
    found, _ = forked(_read_by, job, layout)
    assert found
    assert all("pp4 ep2 rank" in x and "last_norm.weight is asked for" in x for x in found)


def _read_by(job: Job, layout: Layout) -> tuple[list[str], bool]:
    """What is found of a job's checkpoint, and whether this layout has read it."""
    role = RoleRehearsal(job, jobs(job.recipe)[0], into=[layout])
    role._checkpoints({})
    return role.report.findings, layout in role.report.loaded_by


def test_a_bucket_pushed_in_another_dtype_is_found(small, monkeypatch):
    """By the first pipeline stage; the second one makes room for what the header says."""
    broadcast = dist.broadcast

    def widened(tensor, src, group=None, **more):
        if tensor.is_floating_point() and src == 0:
            tensor = tensor.float()
        return broadcast(tensor, src, group=group, **more)

    monkeypatch.setattr(dist, "broadcast", widened)
    found = compare(
        programs(replace(small, model=small.model.model_copy(update={"dtype": "bf16"})))
    )
    assert any("PIPELINE_MODEL_PARALLEL_GROUP" in x and "broadcast" in x for x in found)


PUSHED = [
    ("qwen3_235b_a22b_to_30b_a3b", dict(ep=8)),
    ("qwen3_235b_a22b_to_30b_a3b", dict(pp=2, ep=4)),
    ("qwen3_235b_a22b_to_30b_a3b", dict(tp=2, ep=2, etp=2, pp=2)),
    ("qwen3_235b_a22b_self", dict(tp=4, pp=2, ep=8)),
    ("qwen3_4b_to_4b", dict(pp=2)),
]


@pytest.mark.parametrize(("recipe", "axes"), PUSHED)
def test_planned_bytes_of_a_push_are_the_rehearsed(recipe, axes):
    job = jobs(read_recipe(RECIPE.parent / f"{recipe}.yaml", []))[1][0]
    layout = Layout(**axes)
    job = replace(job, layout=layout, world=layout.unit).with_layers(3)
    planned = push_bytes(ModelSize.of(job.hf), layout)
    assert forked(pushed_bytes, job) == pytest.approx(planned, rel=0.05)


def pushed_bytes(job: Job) -> int:
    """The most that rank 0 holds of a push, its parameters left out."""
    mailbox, ledger = Mailbox(job.world // job.layout.pp), Ledger()
    introduce(job, mailbox)
    recorder = Recorder(is_alone=True, mailbox=mailbox)
    with alone(0, job.world, job.layout) as parallel, as_gpu(), Shapes([ledger], recorder):
        recorder.phase = "load"
        stream = WeightStream(build_model(job.hf, parallel, "bf16"), job.hf, parallel)
        recorder.phase = "push"
        with ledger.phase("push", "push"):
            deque(pushed(stream, job.recipe, is_main=True), maxlen=0)
    peak = max((ledger.phases["push"].body, ledger.phases["push"].head), key=lambda x: x.size)
    return peak.kinds["push"]


@pytest.mark.parametrize("objective", ["policy", "topk_kl"])
def test_planned_bytes_of_a_dense_teacher_are_the_rehearsed(objective):
    """Where the top K are looked for the LM head has most of them, else a layer."""
    recipe = RECIPE.parent / "qwen3_4b_to_0p6b.yaml"
    plan, (_, teacher) = jobs(read_recipe(recipe, [f"loss.objective={objective}"]))
    report = forked(_report_of, teacher, plan)
    assert report.peak == pytest.approx(report.planned, rel=0.05)


def _report_of(job: Job, plan: Plan):
    return RoleRehearsal(job, plan, all_layers=False, short=True).run_memory()


@pytest.mark.parametrize("axes", [dict(tp=2, cp=2, pp=2, ep=4), dict(ep=2, etp=2, tp=2), {}])
def test_places_are_megatrons(axes):
    layout, world = Layout(**axes), 2 * Layout(**axes).unit
    for rank in range(world):
        place = Place.of(rank, world, layout)
        with alone(rank, world, layout) as p:
            ours = place.tp, place.cp, place.dp, place.pp, place.etp, place.ep
            assert ours == tuple(x.rank for x in (p.tp, p.cp, p.dp, p.pp, p.etp, p.ep))


def test_a_run_of_many_gpus_is_read_by_ranks_with_different_weights():
    """Of both roles, though a teacher's own world is small; of fewer GPUs every rank reads."""
    recipe = RECIPE.parent / "qwen3_235b_a22b_self.yaml"
    changes = ["cluster={trainer: 512, teacher: 64, rollout: 448}", "rollout.servers.start=56"]
    many = jobs(read_recipe(recipe, [*changes, "teacher.service.processes=64"]))[1]
    for job in many:
        few = [place.shard for place in read_ranks(job.world, job.layout, job.gpus)]
        assert len(few) == len(set(few))
        assert set(few) == {place.shard for place in places(job.world, job.layout)}
    for job in jobs(read_recipe(recipe, []))[1]:
        everyone = read_ranks(job.world, job.layout, job.gpus)
        assert [place.rank for place in everyone] == list(range(job.world))


def test_programs_of_ranks_that_did_not_run_are_those_that_do(small):
    said = programs(small, [0, 3])
    groups, real = Groups(), said[3]
    with alone(0, small.world, small.layout, groups):
        pass
    ours = program_of(3, said[0], 0, groups.by_axis)
    keep = [x for x in real if x.dtype != "uint8"]
    assert [(x.operation, x.ranks, x.nbytes) for x in ours if x.dtype != "uint8"] == [
        (x.operation, x.ranks, x.nbytes) for x in keep
    ]


ASKED = (
    "ranks",
    "tensors",
    "gaps",
    "overlaps",
    "peak_gib",
    "plan_gib",
    "kept_after_backward_gib",
    "collectives",
)


@pytest.mark.parametrize("changes", [[], ["cluster.teacher=1", "teacher.service.processes=1"]])
def test_one_json_object_has_every_figure(changes):
    """Of one role, or of two; counts are numbers, and a finding is a sentence in the list."""
    recipe = read_recipe(RECIPE, ["cluster.trainer=2", *changes])
    told = json.loads(forked(_as_json, recipe))
    assert set(told) == {"findings", "seconds", "peak_rss_mb", "roles", "round_s"}
    assert told["findings"] == []
    assert told["seconds"] > 0
    assert told["peak_rss_mb"] > 100
    assert set(told["round_s"]) == {"rehearsed", "planned"}
    assert list(told["roles"]) == ["trainer", "teacher"][: 1 + bool(changes)]
    for role in told["roles"].values():
        assert set(ASKED) <= set(role)
        assert (role["gaps"], role["overlaps"]) == (0, 0)
        phase = "forward/backward" if "forward/backward" in role["collectives"] else "score"
        assert all(x["calls"] > 0 for x in role["collectives"][phase].values())


def test_two_times_that_differ_say_why(monkeypatch):
    """Over 20 percent, with a micro-batch both ways and where it goes; nothing is said below."""
    recipe = read_recipe(RECIPE.parent / "qwen3_4b_to_0p6b.yaml", [])
    assert "differ" not in forked(_table, recipe)
    monkeypatch.setattr(costs, "LAUNCH", 200 * costs.LAUNCH)
    told = forked(_table, recipe)
    said = re.search(
        r"differ by more than 20%: .* takes ([\d.]+) s here, ([\d.]+) s in the plan; .* to (.+)",
        told,
    )
    assert said is not None, told
    assert float(said[1]) > float(said[2]) > 0
    assert "%" in said[3]


def _table(recipe: Recipe) -> str:
    console = Console(width=400, file=io.StringIO())
    table_of_rehearsal.show(full.rehearse(recipe, short=True), console)
    return console.file.getvalue()


def _as_json(recipe: Recipe) -> str:
    return json.dumps(full.rehearse(recipe, short=True).as_json())


def test_counts_of_experts_are_whole_and_hot():
    assert expert_counts(100, 8, 2, 4, 1.0) == [25] * 8
    hot = expert_counts(100, 8, 2, 4, 2.0)
    assert sum(hot) == 200
    assert hot[:2] == [50, 50]
