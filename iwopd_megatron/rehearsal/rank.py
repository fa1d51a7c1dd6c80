"""One rank of a role, alone, at real size: everything it does in a round, on shapes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from iwopd_megatron.batch.objective import DistillationObjective, LikelihoodObjective, Objective
from iwopd_megatron.batch.packing import MicroBatch, Packer, Support
from iwopd_megatron.batch.trajectory import Trajectory
from iwopd_megatron.config.models import Frozen
from iwopd_megatron.hf.config import HfConfig
from iwopd_megatron.plan.hardware import Gpu, Rates
from iwopd_megatron.rehearsal.checkpoints import Piece, pieces_of
from iwopd_megatron.rehearsal.collectives import Call, Mailbox, Recorder
from iwopd_megatron.rehearsal.costs import Costs
from iwopd_megatron.rehearsal.job import LONGEST, SEQUENCES, Job
from iwopd_megatron.rehearsal.ledger import Ledger, Phase, Storage
from iwopd_megatron.rehearsal.memoryless import Memoryless, Watched
from iwopd_megatron.rehearsal.on_host import told_apart
from iwopd_megatron.rehearsal.push import LOAD, PUSH, pushed
from iwopd_megatron.rehearsal.routing import Routing
from iwopd_megatron.rehearsal.sources import HollowFolder
from iwopd_megatron.rehearsal.world import Groups, alone
from iwopd_megatron.runtime import device
from iwopd_megatron.runtime.megatron import mpu
from iwopd_megatron.runtime.parallel import Parallel
from iwopd_megatron.teacher.embedded import EmbeddedScorer
from iwopd_megatron.train import checkpoint
from iwopd_megatron.train.student import StudentModel
from iwopd_megatron.weights.hf_reader import Source


@dataclass
class RankRun:
    """What one rank did: calls by phase, bytes by phase, seconds by phase and operation."""

    rank: int
    calls: dict[str, list[Call]] = field(default_factory=dict)
    memory: dict[str, Phase] = field(default_factory=dict)
    kept: list[Storage] = field(default_factory=list)  # made by forward and backward, still there
    pushed: int = 0  # bytes of weights that the engine gets
    pieces: list[Piece] = field(default_factory=list)  # of a checkpoint
    seconds: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def program(self) -> list[Call]:
        """All calls in order."""
        return [call for calls in self.calls.values() for call in calls]


class RankRehearsal:
    """Runs one rank's phases under observers."""

    def __init__(
        self,
        job: Job,
        gpu: Gpu,
        rates: Rates,
        mailbox: Mailbox | None = None,
        folder: Callable[[HfConfig, Path], Mapping[str, Source]] = lambda hf, _: HollowFolder(hf),
    ):
        """folder: returns a model's tensors, of its config and its Hugging Face folder."""
        self.job, self.folder = job, folder
        self.ledger, self.costs = Ledger(), Costs(gpu, rates)
        self.mailbox = mailbox
        self.result = RankRun(-1)

    @contextlib.contextmanager
    def phase(self, name: str, kind: str) -> Iterator[None]:
        """Account what runs inside to this phase."""
        before, self.costs.name, self.recorder.phase = self.costs.name, name, name
        start = len(self.recorder.calls)
        with self.ledger.phase(name, kind):
            yield
        self.costs.name = self.recorder.phase = before
        self.result.calls.setdefault(name, []).extend(self.recorder.calls[start:])

    def run(
        self,
        rank: int,
        hot: float = 1.0,
        groups: Groups | None = None,
        mode: type[Memoryless] = Memoryless,
    ) -> RankRun:
        """Run `rank` with `hot` times the mean tokens on the first expert rank; return what it did.

        groups: takes the world's process groups; mode: `Shapes` where calls alone are wanted, in
        which attention is none of a GPU's kernels and its bytes and seconds mean nothing.
        """
        with alone(rank, self.job.world, self.job.layout, groups) as parallel, device.as_gpu():
            return self.perform(parallel, mode, Recorder(True, self.mailbox), hot)

    def perform(
        self, parallel: Parallel, mode: type[Watched], recorder: Recorder, hot: float = 1.0
    ) -> RankRun:
        """Do all phases as the rank of `parallel`, under a mode; in a real world `Watched`."""
        self.result.rank, self.recorder = parallel.rank, recorder
        with mode([self.ledger, self.costs], recorder):
            (self._train if self.job.trains else self._score)(parallel, hot)
        self.result.memory = self.ledger.phases
        self.result.seconds = dict(self.costs.phases)
        return self.result

    def _train(self, parallel: Parallel, hot: float) -> None:
        job, recipe = self.job, self.job.recipe
        with self.phase(LOAD, "weights"):
            folder = self.folder(job.hf, recipe.student.hf)
            student = StudentModel(recipe, parallel, job.hf, folder)
        self._tell_apart(student)
        packer = Packer(parallel, job.tokens)
        samples = self.samples(parallel)
        self._embedded(packer, samples, hot)
        routing = Routing(student.chunks, parallel, hot)
        with self.phase("pack", "batch"):
            batches, length = packer(samples, recipe.loss.aggregation)
            batches = [self._with_support(batch) for batch in batches]
        if recipe.is_distilling and recipe.steps_per_round > 1:
            with self.phase("old log-probs", "activations"):
                student.score(samples, packer)
        with self.phase("forward/backward", "activations"):
            kept = student.accumulate(batches, length, self.objective(parallel))
        del kept, batches
        for buffer in mpu.get_global_memory_buffer().buffer.values():
            self.ledger.count_as(buffer, "buffer")  # gathered sequences', used again and again
        alive = self.ledger.alive("forward/backward")
        self.result.kept = [x for x in alive if x.kind != "buffer"]
        if hot > 1:  # what follows is the same
            return
        with self.phase("step", "step"):
            student.step()
        with self.phase(PUSH, PUSH):
            given = pushed(student.stream, recipe, parallel.rank == 0)
            self.result.pushed = sum(tensor.nbytes for _, tensor in given)
        with self.phase("save", "save"), told_apart(self.ledger):
            state = checkpoint.sharded_state(
                student.chunks, student.optimizer, parallel, is_loading=False
            )
            self.result.pieces = pieces_of(state)
            del state
        routing.remove()

    def _score(self, parallel: Parallel, hot: float) -> None:
        packer = Packer(parallel, self.job.tokens)
        samples = self.samples(parallel)
        self._scorer("", self.job, packer, samples, hot)

    def _embedded(self, packer: Packer, samples: list[Trajectory], hot: float) -> None:
        """Have every model score that lives in the trainer's processes."""
        self.scorers = [
            self._scorer(name, replace_model(self.job, hf, model), packer, samples, hot)
            for name, (hf, model) in self.job.embedded.items()
        ]

    def _scorer(
        self, name: str, job: Job, packer: Packer, samples: list[Trajectory], hot: float
    ) -> EmbeddedScorer:
        """Have a model score: one of these in the trainer's processes, a service's without name."""
        with self.phase(f"load {name}".strip(), "scorer" if name else "weights"):
            assert isinstance(job.model, Frozen)
            folder = self.folder(job.hf, job.model.hf)
            scorer = EmbeddedScorer(job.model, packer, 1.0, job.hf, folder)
        routing = Routing(scorer.chunks, packer.parallel, hot)
        with self.phase(f"score {name}".strip(), "activations"):
            scores = scorer.score_samples(samples, 0 if name == "base" else job.recipe.topk)
        del scores
        routing.remove()
        return scorer

    def objective(self, parallel: Parallel) -> Objective:
        """Return the recipe's objective of one optimiser step."""
        recipe = self.job.recipe
        if not recipe.is_distilling:
            return LikelihoodObjective()
        return DistillationObjective(recipe.loss, parallel.cp.group)

    def samples(self, parallel: Parallel) -> list[Trajectory]:
        """Return answers of equal length that fill every micro-batch of every copy."""
        job = self.job
        each = min(SEQUENCES, max(1, job.tokens // LONGEST))
        multiple = job.layout.token_multiple
        length = job.tokens // each // multiple * multiple
        prompt, response = [5] * (length // 8), [7] * (length + 1 - length // 8)
        scores = [-1.0] * len(response)
        old = scores if job.recipe.is_distilling and job.recipe.steps_per_round > 1 else []
        return [
            Trajectory(i, prompt, response, scores, scores, old_logp=old)
            for i in range(each * job.microbatches * parallel.dp.size)
        ]

    def _with_support(self, batch: MicroBatch) -> MicroBatch:
        topk = self.job.recipe.topk
        if not topk:
            return batch
        ids = torch.zeros(len(batch.rows), topk, dtype=torch.int64)
        return replace(batch, support=Support(ids, torch.zeros(ids.shape, dtype=torch.float32)))

    def _tell_apart(self, student: StudentModel) -> None:
        """Count the storages that parameters, gradients and optimiser ended up in as such."""
        for chunk in student.chunks:
            for parameter in chunk.parameters():
                self.ledger.count_as(parameter.data, "weights")
                self.ledger.count_as(parameter.main_grad, "gradients")
        for state in student.optimizer.chained_optimizers:
            for group in state.optimizer.param_groups:
                for parameter in group["params"]:
                    self.ledger.count_as(parameter.data, "optimizer")
            for entry in state.optimizer.state.values():
                for value in entry.values():
                    if isinstance(value, torch.Tensor):
                        self.ledger.count_as(value, "optimizer")


def replace_model(job: Job, hf: HfConfig, model: Frozen) -> Job:
    """Return a job for a model that is embedded in the trainer's processes."""
    return replace(job, hf=hf, model=model, tokens=model.microbatch_tokens or job.tokens)
