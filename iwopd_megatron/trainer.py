"""The loop: generate, score, check, pack, train, publish; or fine-tune on given responses.

Every rank runs this same straight-line code; samples are known to all ranks, so packing,
denominators and gates need no messages.
"""

from __future__ import annotations

import contextlib
import math
import time
from typing import Any

import torch
import yaml
from transformers import AutoTokenizer

from iwopd_megatron import checkpoint, device, doctor, gates
from iwopd_megatron.config import Recipe
from iwopd_megatron.config_data import Source
from iwopd_megatron.data_sources import read_source
from iwopd_megatron.evaluate import Evaluator, grade_samples
from iwopd_megatron.flops import attention_cost
from iwopd_megatron.grading import check_graders
from iwopd_megatron.hf_io import save_folder
from iwopd_megatron.metrics import NLL_SUMS, SUMS, reduce_sums, response_means, token_means
from iwopd_megatron.minibatch import Minibatch
from iwopd_megatron.packing import Packer
from iwopd_megatron.parallel import Parallel, any_rank, gather
from iwopd_megatron.preflight_scorers import check_sources
from iwopd_megatron.progress import Progress
from iwopd_megatron.rollout import Prompt, Sampling
from iwopd_megatron.rollout.make import make_engine
from iwopd_megatron.runlog import MetricsLog
from iwopd_megatron.samples import keep_samples
from iwopd_megatron.stop import stop_requested
from iwopd_megatron.student import Student
from iwopd_megatron.supervision import Supervision
from iwopd_megatron.training_set import load_training_set
from iwopd_megatron.trajectory import Trajectory


class Trainer:
    """One run: its models, its data order, its folder."""

    def __init__(
        self, recipe: Recipe, parallel: Parallel, progress: Progress, resume: bool = False
    ):
        self.recipe, self.parallel, self.progress = recipe, parallel, progress
        self.tokenizer = AutoTokenizer.from_pretrained(recipe.student.hf)
        self._load_data()
        self.student = Student(recipe, parallel)
        self.engine = make_engine(recipe, parallel, progress.say)
        cost = attention_cost(self.student.hf)
        self.packer = Packer(parallel, recipe.train.microbatch_tokens, cost)
        self.supervision = Supervision(recipe, self.student, self.packer, self.tokenizer)
        self.is_distilling = recipe.is_distilling
        for role, model in self.supervision.models.items():
            progress.loaded(role, gather(model.loaded))
        self.round, self.seconds = 0, {}
        found = checkpoint.newest(recipe.out, parallel, progress.say) if resume else None
        if found is not None:
            self.round, self.order.cursor = self.student.restore(found)
            progress.say(f"resumed after round {self.round} from {found}")
        self.log = None
        if parallel.is_main:
            self.log = MetricsLog(recipe.out, self.round if found else None)
            resolved = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)
            (recipe.out / "recipe.yaml").write_text(resolved)

    def _load_data(self) -> None:
        recipe = self.recipe
        limit = recipe.rollout.max_prompt_tokens
        found = load_training_set(recipe, self.tokenizer)
        found.check(limit)
        self.problems = found.problems
        check_sources(recipe, {problem.source for problem, _ in found.problems})
        if recipe.is_distilling:
            check_graders({problem.grader for problem, _ in found.problems})
        if found.too_long:
            self.progress.say(f"{found.too_long} prompts longer than {limit} tokens are left out.")
        total = found.too_long + len(found.problems)
        for finding in doctor.long_prompts(found.too_long, total, limit):
            self.progress.say(f"note: {finding}")
        self.order = found.order(recipe.train.seed, recipe.data.shuffle)
        self.evaluator = None
        if recipe.data.eval is not None:
            self.evaluator = Evaluator(
                read_source(Source(path=recipe.data.eval))[0][: recipe.evaluate.problems],
                self.tokenizer,
                recipe.rollout.max_response_tokens,
                recipe.evaluate.temperature,
            )

    def run(self) -> bool:
        """Train to the last round; False if a stop was asked for and the state saved instead."""
        rounds, every = self.recipe.train.rounds, self.recipe.checkpoint.every
        self.engine.update(self.student.stream, self.round)
        if self.round == 0:
            tied = self.student.hf.get("tie_word_embeddings", False)
            gates.first_weights(self.student.stream, Student.sources(self.recipe), tied)
            self._evaluate({})
        while self.round < rounds:
            self.round += 1
            line = self._round()
            is_last = self.round == rounds
            if is_last or self.round % self.recipe.evaluate.every == 0:
                self._evaluate(line)
            stop = any_rank(stop_requested())
            if stop or (every and (is_last or self.round % every == 0)):
                keep = self.recipe.checkpoint.keep
                self.student.save(self.recipe.out, self.round, self.order.cursor, keep)
            if stop and not is_last:
                return False
        self._export()
        return True

    def _export(self) -> None:
        """Write the final weights as a Hugging Face folder; the last act of a run."""
        if self.log is None:
            for _ in self.student.stream:  # every rank takes part in gathering
                pass
            return
        save_folder(self.recipe.out / "hf", self.student.stream, self.recipe.student.hf)
        self.log.close()

    def _round(self) -> dict[str, Any]:
        """One round; returns its metrics line, clock figures included."""
        start = time.perf_counter()
        self.seconds = {}
        samples = self._own_responses() if self.is_distilling else self._given_responses()
        with self._phase("score"):
            minibatches = self.supervision.minibatches(samples, self.round)
        self.samples = [sample for minibatch in minibatches for sample in minibatch.samples]
        self.objective = minibatches[0].objective
        line = {"kind": "round", "round": self.round}
        with self._phase("train"):
            line |= self._train(minibatches)
        if self.is_distilling:
            line |= response_means(self.samples)
        with self._phase("sync"):
            self.engine.update(self.student.stream, self.round)
        seconds = time.perf_counter() - start
        tokens_per_second = line["response_tokens"] / seconds
        clock = {"tokens_per_second": tokens_per_second, "seconds": seconds, "time": self.seconds}
        self._write(line, clock)
        self.progress.round(line | clock)
        return line | clock

    def _train(self, minibatches: list[Minibatch]) -> dict[str, Any]:
        """The round's optimiser steps; means over all of them."""
        recipe, sizes = self.recipe, NLL_SUMS
        if self.is_distilling:
            sizes = SUMS[recipe.loss.objective]
        total, norms = {name: torch.zeros(n).double() for name, n in sizes.items()}, []
        for _ in range(recipe.train.epochs):
            for minibatch in minibatches:
                if not any(sample.loss_tokens for sample in minibatch.samples):
                    self._say_skipped("every response token is masked")
                    continue
                batches, length = minibatch.pack(self.packer, recipe.loss.aggregation)
                kept = self.student.accumulate(batches, length, minibatch.objective)
                sums = reduce_sums(kept, self.parallel, sizes)
                if self.is_distilling:
                    gates.drift((sums["drift"] / sums["tokens"]).item(), recipe.gates.max_drift)
                norms.append(self.student.step())
                if not math.isfinite(norms[-1]):
                    self._say_skipped(f"the gradient norm is {norms[-1]}")
                total = {name: total[name] + sums[name] for name in sizes}
        line = {
            "loss": total["loss"].item() / max(len(norms), 1),
            "response_tokens": sum(len(sample.response_ids) for sample in self.samples),
            "loss_tokens": round(total["tokens"].item() / recipe.train.epochs),
        }
        if self.is_distilling:
            line |= token_means(total)
        line |= {"grad_norm": sum(norms) / max(len(norms), 1), "lr": self.student.lr}
        self.student.end_round()
        return line

    def _say_skipped(self, reason: str) -> None:
        self.progress.say(f"round {self.round}: {reason}; this optimiser step is left out.")

    def _own_responses(self) -> list[Trajectory]:
        """The student's answers to the next prompts, graded and masked."""
        rollout, vocab = self.recipe.rollout, self.student.hf["vocab_size"]
        chosen = self.order.take(self.recipe.train.prompts_per_round)
        self.round_problems = [self.problems[i][0] for i in chosen]
        prompts = [Prompt(place, self.problems[i][1]) for place, i in enumerate(chosen)]
        seed = self.recipe.train.seed
        sampling = Sampling(
            rollout.max_response_tokens, rollout.temperature, rollout.top_p, seed, self.round
        )
        with self._phase("generate"):
            samples = self.engine.generate(prompts, sampling)
        gates.rollouts(samples, self.round - 1, vocab)
        with self._phase("grade"):
            grades = grade_samples(samples, self.round_problems, self.tokenizer)
        graded = [s.with_scores(correct=grade) for s, grade in zip(samples, grades, strict=True)]
        return [self.supervision.masked(sample) for sample in graded]

    def _given_responses(self) -> list[Trajectory]:
        """The next problems with the responses of the data file."""
        samples = []
        for place, i in enumerate(self.order.take(self.recipe.train.prompts_per_round)):
            problem, ids = self.problems[i]
            response = self.tokenizer.encode(problem.response, add_special_tokens=False)
            sample = Trajectory(place, ids, [*response, self.tokenizer.eos_token_id])
            samples.append(self.supervision.masked(sample))
        return samples

    def _evaluate(self, last_round: dict[str, Any]) -> None:
        if self.evaluator is None:
            return
        start = time.perf_counter()
        accuracy = self.evaluator.accuracy(self.engine)
        line = {"kind": "eval", "round": self.round, "accuracy": accuracy}
        line["problems"] = len(self.evaluator.problems)
        self._write(line, {"seconds": time.perf_counter() - start})
        self.progress.evaluation(line, last_round)
        if self.is_distilling and self.round > 0 and self.parallel.is_main:
            keep_samples(
                self.recipe.out, self.round, self.samples, self.round_problems, self.tokenizer,
                self.objective.weighting,
            )  # fmt: skip

    def _write(self, line: dict[str, Any], clock: dict[str, Any]) -> None:
        if self.log is not None:
            self.log.write(line, clock)

    @contextlib.contextmanager
    def _phase(self, name: str):
        start = time.perf_counter()
        yield
        device.synchronize()
        self.seconds[name] = time.perf_counter() - start
