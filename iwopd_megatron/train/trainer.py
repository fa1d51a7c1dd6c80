"""The loop: generate, score, check, pack, train, publish; or fine-tune on given responses.

Every rank runs this same straight-line code; samples are known to all ranks, so packing,
denominators and gates need no messages.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from iwopd_megatron.batch import gates
from iwopd_megatron.batch.metrics import response_means
from iwopd_megatron.batch.packing import Packer
from iwopd_megatron.batch.trajectory import Trajectory
from iwopd_megatron.config.recipe import Recipe
from iwopd_megatron.data.run_data import RunData, load_run_data
from iwopd_megatron.errors import GateError, RecipeError
from iwopd_megatron.evaluation.evaluate import Evaluation, grade_samples
from iwopd_megatron.grading.pool import count_trouble, describe
from iwopd_megatron.hf.answer_end import all_end_ids, end_id, response_ids
from iwopd_megatron.hf.companions import write_companions
from iwopd_megatron.hf.flops import attention_cost
from iwopd_megatron.records.progress import Progress
from iwopd_megatron.records.recorder import Recorder
from iwopd_megatron.rollout.make import make_engine
from iwopd_megatron.rollout.servers import Canary
from iwopd_megatron.runtime import device
from iwopd_megatron.runtime.parallel import Parallel, any_rank, gather
from iwopd_megatron.runtime.stop import stop_requested
from iwopd_megatron.train import checkpoint
from iwopd_megatron.train.collect import Collector
from iwopd_megatron.train.saver import Saver
from iwopd_megatron.train.steps import train_round
from iwopd_megatron.train.student import Student
from iwopd_megatron.train.supervision import Supervision


class Trainer:
    """One run: its models, its data order, its folder."""

    def __init__(
        self, recipe: Recipe, parallel: Parallel, progress: Progress, resume: bool = False,
        data: RunData | None = None,
    ):  # fmt: skip
        """`data` is what whoever started the run has loaded of the recipe already."""
        self.recipe, self.parallel, self.progress = recipe, parallel, progress
        self.is_distilling, self.round, self.seconds = recipe.is_distilling, 0, {}
        self.recorder = Recorder(recipe, parallel, progress.say)
        self.tokenizer = AutoTokenizer.from_pretrained(recipe.student.hf)
        self.end_ids = all_end_ids(recipe.student.hf, self.tokenizer)
        self._take(data or load_run_data(recipe, self.tokenizer))
        self.student = Student(recipe, parallel)
        cost = attention_cost(self.student.hf)
        self.packer = Packer(parallel, recipe.train.microbatch_tokens, cost)
        longest = max((ids for _, ids in self.problems), key=len)
        probe = partial(self.student.probe, longest, self.packer)
        canary = Canary(longest, probe, recipe.gates.max_canary)
        self.engine = make_engine(recipe, parallel, self._service_event, canary)
        self.supervision = Supervision(recipe, self.student, self.packer, self.tokenizer)
        self.collector = Collector(
            recipe, parallel, self.problems, self.order, self.engine, self._begin
        )
        for role, model in self.supervision.models.items():
            progress.loaded(role, gather(model.loaded))
        settings = recipe.checkpoint
        self.saver = Saver(
            recipe.out, settings.keep, settings.async_save, parallel, self._write_companions
        )
        if resume:
            self._go_on()
        self.truncated = self.recorder.open(self.round or None)

    def _take(self, data: RunData) -> None:
        recipe, limit = self.recipe, self.recipe.rollout.max_prompt_tokens
        self.problems = data.training.problems
        if data.training.too_long:
            self.progress.say(
                f"{data.training.too_long} prompts longer than {limit} tokens are left out."
            )
        for note in data.notes:
            self.progress.say(f"note: {note}")
        self.order = data.training.order(recipe.train.seed, recipe.data.shuffle)
        self.prompts = checkpoint.digest_of(self.problems)
        self.evaluation = Evaluation(recipe, data, self.tokenizer)

    def _write_companions(self, folder: Path) -> None:
        write_companions(self.recipe.student.hf, folder, self.end_ids)

    def _go_on(self) -> None:
        """Restore the newest sound checkpoint, if there is one."""
        out = self.recipe.out
        found = checkpoint.newest(out, self.parallel, self.progress.say)
        if found is None:
            self.progress.say(f"note: {out} has no checkpoint; the run begins with its first round")
            return
        kept = self.student.restore(found)
        if kept.get("prompts", self.prompts) != self.prompts:
            raise RecipeError(
                f"data.train does not hold the prompts that {out} was started with; put its files "
                "back to resume, or start a new run with out=FOLDER."
            )
        self.round, self.collector.order.cursor = kept["round"], kept["cursor"]
        self.recorder.event(self.round, "resumed", f"resumed after round {self.round} from {found}")

    def run(self) -> bool:
        """Train to the last round; False if a stop was asked for and the state saved instead."""
        try:
            return self._run()
        except GateError as error:
            self.recorder.keep_event(self.round, "gate", str(error))
            raise
        finally:
            self.engine.close()
            self.supervision.close()

    def _run(self) -> bool:
        rounds, every = self.recipe.train.rounds, self.recipe.checkpoint.every
        self.engine.update(self.student.stream, self.round)
        if self.round == 0:
            gates.first_weights(self.student.stream, Student.sources(self.recipe))
            self._evaluate({})
        while self.round < rounds:
            self.round += 1
            line = self._round()
            is_last = self.round == rounds
            if is_last or self.round % self.recipe.evaluate.every == 0:
                self._evaluate(line)
            stop = any_rank(stop_requested())
            if stop or (every and (is_last or self.round % every == 0)):
                kept = {"cursor": self.collector.cursor, "prompts": self.prompts}
                self.student.save(self.saver, self.round, kept)
            self.saver.poll()
            if stop and not is_last:
                self.saver.finish()
                return False
        self.saver.finish()
        self.recorder.export(self.student.stream, self.end_ids)
        return True

    def _round(self) -> dict[str, Any]:
        """One round; returns its metrics line, clock figures included."""
        start = time.perf_counter()
        self.seconds = {}
        samples = self._own_responses() if self.is_distilling else self._given_responses()
        early = self.supervision.scored_early(samples) if self.parallel.is_main else None
        with self._phase("score"):
            minibatches = self.supervision.minibatches(samples, self.round)
        self.samples = [sample for minibatch in minibatches for sample in minibatch.samples]
        self.objective = minibatches[0].objective
        if self.recipe.rollout.max_staleness and self.round < self.recipe.train.rounds:
            self.collector.prefetch(self.round + 1)
        line = {"kind": "round", "round": self.round}
        with self._phase("train"):
            line |= train_round(
                self.recipe, self.student, self.packer, minibatches, self._say_skipped
            )
        if self.is_distilling:
            line |= response_means(self.samples)
            line |= {"grading_trouble": self.trouble.total()}
            if self.recipe.gates.on_bad_sample == "drop":
                line["dropped"] = _unread(self.samples) - _unread(samples)
                if line["dropped"]:
                    text = f"round {self.round}: {line['dropped']} answers are left out."
                    self.recorder.event(self.round, "dropped", text)
            self.truncated.append(line["truncated"])
        with self._phase("sync"):
            self.engine.update(self.student.stream, self.round)
        seconds = time.perf_counter() - start
        tokens_per_second = line["response_tokens"] / seconds
        clock = {"tokens_per_second": tokens_per_second, "seconds": seconds, "time": self.seconds}
        if early is not None:
            clock["scored_early"] = early
        self.recorder.write(line, clock)
        self.collector.end_round(self.round)
        self.progress.round(line | clock)
        return line | clock

    def _say_skipped(self, reason: str) -> None:
        text = f"round {self.round}: {reason}; this optimiser step is left out."
        self.recorder.event(self.round, "skipped step", text)

    def _say_trouble(self, trouble: Counter[str]) -> None:
        if trouble:
            text = f"round {self.round}: {describe(trouble)}."
            self.recorder.event(self.round, "grading", text)

    def _service_event(self, text: str) -> None:
        self.recorder.event(self.round, "service", text)

    def _own_responses(self) -> list[Trajectory]:
        """The student's answers to the next prompts, graded and masked."""
        rollout, vocab = self.recipe.rollout, self.student.hf.vocab_size
        with self._phase("generate"):
            self.round_problems, samples = self.collector.answers(self.round)
        gates.rollouts(samples, self.round - 1, vocab, rollout.max_staleness)
        gates.truncation(self.truncated, samples, self.recipe.gates.max_truncation_jump)
        if rollout.routing_replay:
            gates.routes(samples, self.student.hf)
        with self._phase("grade"):
            grades = grade_samples(samples, self.round_problems, self.tokenizer)
        self.trouble = count_trouble(grades)
        self._say_trouble(self.trouble)
        graded = [s.with_scores(correct=g.right) for s, g in zip(samples, grades, strict=True)]
        return [self.supervision.masked(sample) for sample in graded]

    def _begin(self, sample: Trajectory) -> None:
        """An answer has ended, on rank 0: its scoring may start."""
        if self.recipe.rollout.stream_scoring:
            self.supervision.begin(self.supervision.masked(sample))

    def _given_responses(self) -> list[Trajectory]:
        """The next problems with the responses of the data file."""
        samples, end = [], end_id(self.recipe.student.hf, self.tokenizer)
        for place, (problem, ids) in enumerate(self.collector.take()):
            response = response_ids(problem.target, end, self.tokenizer)
            samples.append(self.supervision.masked(Trajectory(place, ids, response)))
        return samples

    def _evaluate(self, last_round: dict[str, Any]) -> None:
        if not self.evaluation:
            return
        start = time.perf_counter()
        scores = self.evaluation.scores(self.engine)
        trouble = self.evaluation.trouble
        line = {"kind": "eval", "round": self.round} | scores
        line |= {"grading_trouble": trouble.total()}
        self._say_trouble(trouble)
        self.recorder.write(line, {"seconds": time.perf_counter() - start})
        self.progress.evaluation(line, last_round)
        if self.is_distilling and self.round > 0:
            kept = self.samples, self.round_problems, self.tokenizer, self.objective.weighting
            self.recorder.samples(self.round, *kept)

    @contextlib.contextmanager
    def _phase(self, name: str):
        start = time.perf_counter()
        yield
        device.synchronize()
        self.seconds[name] = time.perf_counter() - start


def _unread(samples: list[Trajectory]) -> int:
    return sum(sample.loss_tokens == 0 for sample in samples)
