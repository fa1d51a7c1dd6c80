"""One role's rehearsal: its slices, few ranks that differ, all ranks' programs, and its figures.

Two small models, of two and of three layers in every chunk, give what a layer takes, and a third
one what a layer of another kind does; all the rest is counted once. Bytes, calls and seconds are
linear in the layers of each kind, which a test holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from iwopd_megatron.config.models import Layout
from iwopd_megatron.config.stages import distinct_stages
from iwopd_megatron.plan.memory import Precision, push_bytes
from iwopd_megatron.plan.plan import Plan
from iwopd_megatron.rehearsal.checkpoints import Piece
from iwopd_megatron.rehearsal.collectives import Call, Mailbox
from iwopd_megatron.rehearsal.figures import Figures, Small, small_models
from iwopd_megatron.rehearsal.job import Job
from iwopd_megatron.rehearsal.ledger import Phase, Storage
from iwopd_megatron.rehearsal.memoryless import Memoryless, Shapes
from iwopd_megatron.rehearsal.place import Place, covering, places
from iwopd_megatron.rehearsal.push import introduce
from iwopd_megatron.rehearsal.rank import RankRehearsal, RankRun
from iwopd_megatron.rehearsal.replay import compare, play, program_of
from iwopd_megatron.rehearsal.report import GIB, RoleReport, on_gpu
from iwopd_megatron.rehearsal.resharding import check_checkpoints, others
from iwopd_megatron.rehearsal.slices import Slices, read_slices
from iwopd_megatron.rehearsal.world import Groups

KEPT = 0.02  # of the peak: what forward and backward may leave behind
ROOM, SLACK = 1.1, 0.5 * GIB  # a rank may take so many times the planned bytes, and so many more
HOT = (2.0, 4.0)


class RoleRehearsal:
    """Rehearses one job."""

    def __init__(
        self,
        job: Job,
        plan: Plan,
        all_layers: bool = False,
        short: bool = False,
        into: Sequence[Layout] = (),
    ):
        self.job, self.plan, self.short, self.into = job, plan, short, into
        small = [] if all_layers else small_models(job)
        self.sizes: list[Small | None] = [*small] or [None]  # None: as it is
        self.computing = "forward/backward" if job.trains else "score"
        self.report = RoleReport(job.role, job.world, self.computing, Slices())
        self.report.microbatches = job.microbatches
        self.figures = Figures(job, plan, self.report)
        self.groups = Groups()
        self.mailboxes: dict[tuple[Small | None, float], Mailbox] = {}  # by size, hot

    def run(self) -> RoleReport:
        """Do all parts; return what was found."""
        report, job = self.report, self.job
        report.slices = read_slices(self._job(self.sizes[0]) if self.short else job)
        report.findings += report.slices.findings
        ranks = covering(job.world, job.layout)
        report.rehearsed = [place.rank for place in ranks]
        firsts = {place.pp: place for place in reversed(ranks)}  # of every stage
        busy = self._busy(firsts)
        runs = [self._runs(size, busy) for size in self.sizes]
        others = [place for place in ranks if place not in busy]
        self._memory(runs, busy)
        everyone = runs[0] | self._runs(self.sizes[0], others, mode=Shapes)
        self._programs(everyone, firsts)
        if job.trains:
            self.figures.push([x[ranks[0].rank] for x in runs])
            self._checkpoints({rank: run.pieces for rank, run in everyone.items()})
        self.figures.volumes([x[ranks[0].rank] for x in runs])
        self.figures.moved([x[ranks[0].rank] for x in runs])
        self.figures.seconds(runs, busy)
        if job.hf.num_experts and job.layout.ep > 1 and not self.short:
            self._hot(Place.of(report.peak_rank, job.world, job.layout))
        return report

    def run_memory(self) -> RoleReport:
        """Find bytes alone, on ranks of every stage that is unlike others."""
        ranks = covering(self.job.world, self.job.layout)
        busy = self._busy({place.pp: place for place in reversed(ranks)})
        self._memory([self._runs(size, busy) for size in self.sizes], busy)
        return self.report

    def _job(self, size: Small | None) -> Job:
        return self.job if size is None else self.job.with_layers(*size)

    def _busy(self, firsts: dict[int, Place]) -> list[Place]:
        """Return the first rank of every stage that is unlike others, and of the second.

        Of these bytes and seconds are wanted, of the others only what they say.
        """
        stages = {*distinct_stages(self.job.layout, self.job.hf.num_hidden_layers), 0, 1}
        return [place for pp, place in firsts.items() if pp in stages]

    def _runs(
        self,
        size: Small | None,
        ranks: list[Place],
        hot: float = 1.0,
        mode: type[Memoryless] = Memoryless,
    ) -> dict[int, RankRun]:
        """Return what every one of these ranks does, in a model of that size."""
        setup = self.plan.setup
        mailbox = self._mailbox(size, hot)
        found = {}
        for place in ranks:
            rehearsal = RankRehearsal(self._job(size), setup.gpu, setup.rates, mailbox)
            self.groups = Groups()
            found[place.rank] = rehearsal.run(place.rank, hot, self.groups, mode)
        return found

    def _mailbox(self, size: Small | None, hot: float) -> Mailbox:
        """Return what all ranks of a model hear from; where weights are pushed with their names."""
        if (size, hot) not in self.mailboxes:
            mailbox = Mailbox(self.job.world // self.job.layout.pp)
            self.mailboxes[size, hot] = mailbox
            if self.job.trains and hot == 1:
                introduce(self._job(size), mailbox)
        return self.mailboxes[size, hot]

    def _memory(self, runs: list[dict[int, RankRun]], ranks: list[Place]) -> None:
        """Find the busiest rank's bytes by phase and kind, and what is kept."""
        report = self.report
        for place in ranks:
            own = [x[place.rank] for x in runs]
            phases = {
                name: self._peak([x.memory[name] for x in own], place.pp) for name in own[-1].memory
            }
            peak = sum(phases[self.computing].values())
            if peak > report.peak:
                report.peak, report.peak_rank, report.phases = peak, place.rank, phases
            kept = self.figures.at_size([sum(x.nbytes for x in run.kept) for run in own], place.pp)
            if kept > report.kept:
                report.kept = kept
                if kept > KEPT * peak:
                    report.findings.append(self._kept(place.rank, kept, own[-1].kept))
        memory = next(x for x in self.plan.roles if x.name == self.job.role).memory
        report.planned = memory.allocated
        if self.job.trains:
            lasting = replace(memory, activations=0, head=0, kv_cache=0).allocated
            size, width = self.plan.setup.student, Precision.of(self.job.model.dtype).weight
            report.planned_push = lasting + push_bytes(size, self.job.layout, width)
        self._too_much(runs)

    def _peak(self, phases: list[Phase], stage: int) -> dict[str, float]:
        """Return bytes by kind at the most of a phase, whichever of the head's and the layers'."""
        moments = []
        for peaks in ([x.head for x in phases], [x.body for x in phases]):
            kinds = peaks[-1].kinds
            sizes = {k: [x.kinds.get(k, 0) for x in peaks] for k in kinds}
            moments.append({k: self.figures.kind_at_size(k, x, stage) for k, x in sizes.items()})
        return max(moments, key=lambda kinds: sum(kinds.values()))

    def _kept(self, rank: int, kept: float, storages: list[Storage]) -> str:
        largest = storages[0]
        return (
            f"{self.job.role} rank {rank}: {kept / GIB:.2f} GiB of forward and backward are still "
            f"there afterwards, the largest {_described(largest)}."
        )

    def _too_much(self, runs: list[dict[int, RankRun]]) -> None:
        report, gpu = self.report, self.plan.setup.gpu
        for name, kinds in report.phases.items():
            if name != self.computing and on_gpu(kinds) > gpu.memory:
                report.findings.append(
                    f"{report.role} rank {report.peak_rank} takes {on_gpu(kinds) / GIB:.1f} GiB of "
                    f"tensors in its {name}, a GPU has {gpu.memory / GIB:.1f}."
                )
        phase = runs[-1][report.peak_rank].memory[self.computing]
        largest = max((phase.head, phase.body), key=lambda peak: peak.size).largest
        what = f"; the largest at the peak: {_described(largest[0])}" if largest else ""
        if report.peak > gpu.memory:
            report.findings.append(
                f"{report.role} rank {report.peak_rank} takes {report.peak / GIB:.1f} GiB of "
                f"tensors, a GPU has {gpu.memory / GIB:.1f}{what}."
            )
        elif report.peak > ROOM * report.planned + SLACK:
            report.findings.append(
                f"{report.role} rank {report.peak_rank} takes {report.peak / GIB:.1f} GiB of "
                f"tensors, the plan has {report.planned / GIB:.1f}{what}."
            )

    def _programs(self, runs: dict[int, RankRun], firsts: dict[int, Place]) -> None:
        """Compare rehearsed ranks inside each group; play all ranks of the world."""
        programs = {rank: run.program for rank, run in runs.items()}
        self.report.findings += [f"{self.job.role}: {x}" for x in compare(programs)]
        everyone: dict[int, list[Call]] = dict(programs)
        groups = self.groups.by_axis
        for place in places(self.job.world, self.job.layout):
            if place.rank not in everyone:
                template = firsts[place.pp].rank
                everyone[place.rank] = program_of(place.rank, programs[template], template, groups)
        self.report.findings += [f"{self.job.role}: {x}" for x in play(everyone)]

        self.report.calls = sum(map(len, everyone.values()))

    def _checkpoints(self, known: dict[int, list[Piece]]) -> None:
        """Check what all ranks save, for few other layouts, and for those that were asked for."""
        job = self._job(self.sizes[0])
        chosen = list(others(job))
        self.report.findings += check_checkpoints(job, chosen, known)
        if self.into:
            self.report.findings += check_checkpoints(self.job, self.into)
        self.report.loaded_by = [*chosen, *self.into]

    def _hot(self, place: Place) -> None:
        """Find the peak of a rank whose experts get more than their share."""
        for hot in (x for x in HOT if x <= self.job.layout.ep):
            runs = [self._runs(size, [place], hot)[place.rank] for size in self.sizes]
            kinds = self._peak([x.memory[self.computing] for x in runs], place.pp)
            self.report.hot[hot] = sum(kinds.values())


def _described(storage: Storage) -> str:
    shape = ", ".join(map(str, storage.shape))
    return (
        f"{storage.nbytes / GIB:.2f} GiB, {str(storage.dtype)[6:]} [{shape}], made at "
        f"{storage.line}"
    )
