"""The loop: generate, score, check, pack, train, publish; or fine-tune on given responses.

Every rank runs this same straight-line code; samples are known to all ranks, so packing,
denominators and gates need no messages.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import replace
from typing import Any

import yaml
from transformers import AutoTokenizer

from iwopd_megatron import checkpoint, device, gates
from iwopd_megatron.config import Recipe
from iwopd_megatron.data import PromptOrder, encode_prompt, read_problems
from iwopd_megatron.errors import RecipeError
from iwopd_megatron.evaluate import Evaluator, grade_samples
from iwopd_megatron.hf_io import save_folder
from iwopd_megatron.metrics import NLL_SUMS, POLICY_SUMS, policy_means, reduce_sums, response_means
from iwopd_megatron.model import DTYPES
from iwopd_megatron.objective import PolicyObjective, nll_objective
from iwopd_megatron.parallel import Parallel, any_rank
from iwopd_megatron.preflight import eos_ids
from iwopd_megatron.progress import Progress
from iwopd_megatron.rollout import Prompt, Sampling
from iwopd_megatron.rollout.hf import HfEngine
from iwopd_megatron.runlog import MetricsLog
from iwopd_megatron.samples import keep_samples
from iwopd_megatron.stop import stop_requested
from iwopd_megatron.student import Student
from iwopd_megatron.teacher import EmbeddedTeacher
from iwopd_megatron.trajectory import Trajectory, pack
from iwopd_megatron.weighting import RATIO_RULES, ratio_mean


class Trainer:
    """One run: its models, its data order, its folder."""

    def __init__(
        self, recipe: Recipe, parallel: Parallel, progress: Progress, resume: bool = False
    ):
        self.recipe, self.parallel, self.progress = recipe, parallel, progress
        self.tokenizer = AutoTokenizer.from_pretrained(recipe.student.hf)
        self._load_data()
        self.student = Student(recipe, parallel)
        self.engine = HfEngine(
            recipe.student.hf,
            DTYPES[recipe.student.dtype],
            eos_ids(recipe.student.hf),
            recipe.rollout.batch_size,
        )
        self.teacher = self._build_teacher() if recipe.teacher is not None else None
        self.round, self.seconds = 0, {}
        found = checkpoint.newest(recipe.out) if resume else None
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
        problems = read_problems(recipe.data.train, need_response=recipe.teacher is None)
        encoded = [(p, encode_prompt(self.tokenizer, p.question)) for p in problems]
        self.problems = [(problem, ids) for problem, ids in encoded if len(ids) <= limit]
        if not self.problems:
            raise RecipeError(
                f"every prompt of {recipe.data.train} is longer than "
                f"rollout.max_prompt_tokens={limit}; raise it."
            )
        dropped = len(problems) - len(self.problems)
        if dropped:
            self.progress.say(f"{dropped} prompts longer than {limit} tokens are left out.")
        self.order = PromptOrder(len(self.problems), recipe.train.seed, recipe.data.shuffle)
        self.evaluator = None
        if recipe.data.eval is not None:
            self.evaluator = Evaluator(
                read_problems(recipe.data.eval)[: recipe.evaluate.problems],
                self.tokenizer,
                recipe.rollout.max_response_tokens,
                recipe.evaluate.temperature,
            )

    def _build_teacher(self) -> EmbeddedTeacher:
        recipe = self.recipe
        tokenizer = AutoTokenizer.from_pretrained(recipe.teacher.hf)
        gates.same_vocabulary(recipe.student.hf, recipe.teacher.hf, self.tokenizer, tokenizer)
        budget = recipe.train.microbatch_tokens
        return EmbeddedTeacher(recipe.teacher, self.parallel, recipe.rollout.temperature, budget)

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
        start, recipe = time.perf_counter(), self.recipe
        self.seconds = {}
        own = self.teacher is not None
        samples = self._own_responses() if own else self._given_responses()
        with self._phase("pack"):
            budget, aggregation = recipe.train.microbatch_tokens, recipe.loss.aggregation
            batches, length = pack(samples, self.parallel, budget, aggregation)
        line = {"kind": "round", "round": self.round}
        with self._phase("train"):
            objective = self._policy_objective(samples) if own else nll_objective
            kept = self.student.accumulate(batches, length, objective)
            sums = reduce_sums(kept, self.parallel, POLICY_SUMS if own else NLL_SUMS)
            tokens = int(sums["tokens"].item())
            line |= {"loss": sums["loss"].item(), "response_tokens": tokens}
            if own:
                line |= policy_means(sums) | response_means(samples)
                gates.drift(line["drift"], recipe.gates.max_drift)
            line["grad_norm"], line["lr"], applied = self.student.step()
        if not applied:
            self.progress.say(
                f"round {self.round}: the gradient norm is {line['grad_norm']}; "
                "this optimiser step is left out."
            )
        with self._phase("sync"):
            self.engine.update(self.student.stream, self.round)
        seconds = time.perf_counter() - start
        clock = {"tokens_per_second": tokens / seconds, "seconds": seconds, "time": self.seconds}
        self._write(line, clock)
        self.progress.round(line | clock)
        self.samples, self.objective = samples, objective
        return line | clock

    def _policy_objective(self, samples: list[Trajectory]) -> PolicyObjective:
        """With Z_t of the whole round, from the engine's log-probs, which every rank knows."""
        loss, mean = self.recipe.loss, None
        if loss.weighting.rule in RATIO_RULES:
            gaps = [
                [teacher - rollout for teacher, rollout in zip(*scores, strict=True)]
                for scores in ((s.teacher_logp, s.rollout_logp) for s in samples)
            ]
            mean = ratio_mean(gaps, loss.weighting.alpha).to(device.current_device())
        done, rounds = self.round - 1, self.recipe.train.rounds
        return PolicyObjective(loss, self.parallel.cp.group, mean, done, rounds)

    def _own_responses(self) -> list[Trajectory]:
        """The student's answers to the next prompts, graded and scored by the teacher."""
        rollout, vocab = self.recipe.rollout, self.student.hf["vocab_size"]
        chosen = self.order.take(self.recipe.train.prompts_per_round)
        self.round_problems = [self.problems[i][0] for i in chosen]
        prompts = [Prompt(place, self.problems[i][1]) for place, i in enumerate(chosen)]
        seed = self.recipe.train.seed
        sampling = Sampling(rollout.max_response_tokens, rollout.temperature, seed, self.round)
        with self._phase("generate"):
            samples = self.engine.generate(prompts, sampling)
        gates.rollouts(samples, self.round - 1, vocab)
        with self._phase("grade"):
            grades = grade_samples(samples, self.round_problems, self.tokenizer)
        with self._phase("score"):
            samples = self.teacher.score(samples)
        gates.teacher_scores(samples, vocab)
        return [replace(s, correct=grade) for s, grade in zip(samples, grades, strict=True)]

    def _given_responses(self) -> list[Trajectory]:
        """The next problems with the responses of the data file."""
        samples = []
        for place, i in enumerate(self.order.take(self.recipe.train.prompts_per_round)):
            problem, ids = self.problems[i]
            response = self.tokenizer.encode(problem.response, add_special_tokens=False)
            samples.append(Trajectory(place, ids, [*response, self.tokenizer.eos_token_id]))
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
        if self.teacher is not None and self.round > 0 and self.parallel.is_main:
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
