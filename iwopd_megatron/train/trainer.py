"""The loop: generate, score, check, pack, train, publish; or fine-tune on given responses.

`Trainer._round` is the story of a round. Every rank runs this same straight-line code; samples are
known to all ranks, so packing, denominators and gates need no messages.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from transformers import AutoTokenizer

from iwopd_megatron.batch import gates
from iwopd_megatron.batch.metrics import response_means
from iwopd_megatron.batch.packing import Packer
from iwopd_megatron.config.recipe import Recipe
from iwopd_megatron.data.run_data import RunData, load_run_data
from iwopd_megatron.errors import GateError, RecipeError
from iwopd_megatron.evaluation.evaluate import Evaluation, grade_samples
from iwopd_megatron.grading.pool import count_trouble
from iwopd_megatron.hf.answer_end import all_end_ids
from iwopd_megatron.hf.companions import write_companions
from iwopd_megatron.hf.flops import attention_cost
from iwopd_megatron.records.recorder import Recorder
from iwopd_megatron.rollout.make import make_engine
from iwopd_megatron.rollout.servers import Canary
from iwopd_megatron.runtime.parallel import Parallel, any_rank, gather
from iwopd_megatron.runtime.stop import stop_requested
from iwopd_megatron.train import checkpoint
from iwopd_megatron.train.collect import Collector
from iwopd_megatron.train.progress import Progress
from iwopd_megatron.train.round import Clock, Round
from iwopd_megatron.train.round_log import RoundLog
from iwopd_megatron.train.saver import Saver
from iwopd_megatron.train.steps import PackedMinibatch, train_round
from iwopd_megatron.train.student import StudentModel
from iwopd_megatron.train.supervision import make_supervision


class Trainer:
    """One run: its models, its data order, its folder."""

    def __init__(
        self,
        recipe: Recipe,
        parallel: Parallel,
        progress: Progress,
        resume: bool = False,
        data: RunData | None = None,
    ):
        """Load the models and connect the servers of a recipe, in a world that has its layout.

        resume: go on after the newest checkpoint; data: the recipe's, where it is loaded already.
        Collective.
        """
        self.recipe, self.parallel, self.progress = recipe, parallel, progress
        self.round = 0  # the one that runs, or the last one
        self.recorder = Recorder(recipe, parallel, progress.say)
        self.log = RoundLog(self.recorder, progress)
        self.tokenizer = AutoTokenizer.from_pretrained(recipe.student.hf)
        self.end_ids = all_end_ids(recipe.student.hf, self.tokenizer)
        data = data or load_run_data(recipe, self.tokenizer)
        self.log.loaded_data(data, recipe.rollout.max_prompt_tokens)
        problems = data.training.problems
        self.prompts = checkpoint.digest_of(problems)
        self.evaluation = Evaluation(recipe, data, self.tokenizer)
        self.student = StudentModel(recipe, parallel)
        hf, budget = self.student.hf, recipe.train.microbatch_tokens
        self.packer = Packer(parallel, budget, attention_cost(hf))
        longest = max((ids for _, ids in problems), key=len)
        probe = partial(self.student.probe, longest, self.packer)
        canary = Canary(longest, probe, recipe.gates.max_canary)
        self.engine = make_engine(recipe, parallel, self._service_event, canary)
        self.supervision = make_supervision(recipe, self.student, self.packer, self.tokenizer)
        order = data.training.order(recipe.train.seed, recipe.data.shuffle)
        on_answer = self.supervision.begin
        self.collector = Collector(recipe, parallel, problems, order, self.engine, on_answer)
        for role, model in self.supervision.models.items():
            progress.loaded(role, gather(model.loaded))
        settings = recipe.checkpoint
        companions = partial(write_companions, recipe.student.hf, eos_ids=self.end_ids)
        self.saver = Saver(recipe.out, settings.keep, settings.async_save, parallel, companions)
        if resume:
            self._go_on()
        self.truncated = self.recorder.open(self.round or None)  # shares, of every round so far

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
        """Train to the last round; return False if a stop came before and the state is saved."""
        try:
            return self._run()
        except GateError as error:
            self.recorder.keep_event(self.round, "gate", str(error))
            raise
        finally:
            self.engine.close()
            self.supervision.close()
            self.student.close()

    def _run(self) -> bool:
        rounds = self.recipe.train.rounds
        self.engine.update(self.student.stream, self.round)
        if self.round == 0:
            gates.first_weights(self.student.stream, StudentModel.sources(self.recipe))
            self._evaluate(Round(0))
        while self.round < rounds:
            self.round += 1
            is_stopped = self._advance(is_last=self.round == rounds)
            if is_stopped and self.round < rounds:
                self.saver.finish()
                return False
        self.saver.finish()
        self.recorder.export(self.student.stream, self.end_ids)
        return True

    def _advance(self, is_last: bool) -> bool:
        """Run a round, evaluate and save where that is due; return whether a stop was asked for."""
        this = self._round(self.round)
        if is_last or self.round % self.recipe.evaluate.every == 0:
            self._evaluate(this)
        stop, every = any_rank(stop_requested()), self.recipe.checkpoint.every
        if stop or (every and (is_last or self.round % every == 0)):
            kept = {"cursor": self.collector.cursor, "prompts": self.prompts}
            self.student.save(self.saver, self.round, kept)
        self.saver.poll()
        return stop

    def _round(self, number: int) -> Round:
        """Take one round through all its steps, and return it with its metrics."""
        this = Round(number)
        if self.recipe.is_distilling:
            this = self._generate(this)
            self._check_answers(this)
            this = self._grade(this)
        else:
            this = self._read_responses(this)
        this = self._mask(this)
        this = self._score(this)
        self.supervision.check(this.minibatches)
        self._generate_ahead(this)
        this = self._train(this, self._pack(this))
        self._publish(this)
        return self._record(this)

    def _generate(self, this: Round) -> Round:
        """Add the next problems, and the student's answers to them."""
        with this.clock.phase("generate"):
            problems, samples = self.collector.answers(this.number)
        return replace(this, problems=problems, samples=samples)

    def _check_answers(self, this: Round) -> None:
        """GateError unless these are whole answers of the weights that were published last."""
        rollout, hf = self.recipe.rollout, self.student.hf
        gates.rollouts(this.samples, this.number - 1, hf.vocab_size, rollout.max_staleness)
        gates.truncation(self.truncated, this.samples, self.recipe.gates.max_truncation_jump)
        if rollout.routing_replay:
            gates.routes(this.samples, hf)

    def _grade(self, this: Round) -> Round:
        """Add to each answer whether it is right."""
        with this.clock.phase("grade"):
            grades = grade_samples(this.samples, this.problems, self.tokenizer)
        trouble = count_trouble(grades)
        self.log.grading_trouble(this.number, trouble)
        pairs = zip(this.samples, grades, strict=True)
        graded = [sample.with_scores(correct=grade.right) for sample, grade in pairs]
        return replace(this, samples=graded, trouble=trouble)

    def _read_responses(self, this: Round) -> Round:
        """Add the next problems, and the data file's responses to them."""
        problems, samples = self.collector.given(self.tokenizer)
        return replace(this, problems=problems, samples=samples)

    def _mask(self, this: Round) -> Round:
        """Mark in each sample the tokens that the recipe keeps from the loss."""
        return replace(this, samples=[self.supervision.masked(sample) for sample in this.samples])

    def _score(self, this: Round) -> Round:
        """Add minibatches, whose samples have the log-probs of all models that score."""
        early = self.supervision.scored_early(this.samples) if self.parallel.is_main else None
        with this.clock.phase("score"):
            minibatches = self.supervision.minibatches(this.samples, this.number)
        return replace(this, minibatches=minibatches, scored_early=early)

    def _generate_ahead(self, this: Round) -> None:
        """Start the next round's answers under the present weights, where staleness allows it."""
        if self.recipe.rollout.max_staleness and this.number < self.recipe.train.rounds:
            self.collector.prefetch(this.number + 1)

    def _pack(self, this: Round) -> Iterator[PackedMinibatch]:
        """Yield the micro-batches of each optimiser step when it is due; every epoch packs anew."""
        for minibatch in this.minibatches * self.recipe.train.epochs:
            if any(sample.loss_tokens for sample in minibatch.samples):
                packed = minibatch.pack(self.packer, self.recipe.loss.aggregation)
                yield PackedMinibatch(*packed, minibatch.objective)
            else:
                self.log.skipped_step(this.number, "every response token is masked")

    def _train(self, this: Round, packed: Iterable[PackedMinibatch]) -> Round:
        """Take the round's optimiser steps; adds its metrics."""
        line: dict[str, Any] = {"kind": "round", "round": this.number}
        self.saver.make_way(self.student.nbytes)
        with this.clock.phase("train"):
            on_skip = partial(self.log.skipped_step, this.number)
            line |= train_round(self.recipe, self.student, this.scored, packed, on_skip)
        if self.recipe.is_distilling:
            line |= response_means(this.scored) | {"grading_trouble": this.trouble.total()}
            if self.recipe.gates.on_bad_sample == "drop":
                line["dropped"] = this.dropped
                self.log.dropped(this)
            self.truncated.append(line["truncated"])
        return replace(this, metrics=line)

    def _publish(self, this: Round) -> None:
        """Give the new weights to the rollout engine."""
        with this.clock.phase("sync"):
            self.engine.update(self.student.stream, this.number)

    def _record(self, this: Round) -> Round:
        """Write the round down and show it, and forget its journal; adds its timing."""
        this = self.log.recorded(this)
        self.collector.end_round(this.number)
        return this

    def _evaluate(self, this: Round) -> None:
        """Evaluate the weights after this round, if the recipe evaluates."""
        if self.evaluation:
            clock = Clock()
            line: dict[str, Any] = dict(self.evaluation.scores(self.engine))
            if self.recipe.evaluate.reverse_kl and self.evaluation.main is not None:
                line |= self.supervision.distance(self.evaluation.main.answers)
            trouble = self.evaluation.trouble
            self.log.evaluated(this, line, trouble, clock.elapsed(), self.tokenizer)

    def _service_event(self, text: str) -> None:
        self.recorder.event(self.round, "service", text)
