"""The loop: generate, score, check, pack, train, publish. On-policy distillation or SFT.

Every rank runs this same straight-line code; samples are known to all ranks, so packing,
denominators and gates need no messages.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoTokenizer

from iwopd_megatron import checkpoint, device, gates
from iwopd_megatron.actor import Schedule
from iwopd_megatron.config import Recipe, read_hf_config
from iwopd_megatron.data import PromptOrder, encode_prompt, read_problems
from iwopd_megatron.evaluate import Evaluator, grade_samples
from iwopd_megatron.hf_io import HfTensors, load_shards, random_weights, save_folder
from iwopd_megatron.metrics import NLL_SUMS, POLICY_SUMS, policy_means, reduce_sums
from iwopd_megatron.model import DTYPES, build_model, wrap_precision
from iwopd_megatron.objective import PolicyObjective, nll_objective
from iwopd_megatron.optimizer import build_optimizer, build_scheduler, wrap_data_parallel
from iwopd_megatron.parallel import Parallel, any_rank
from iwopd_megatron.progress import Progress
from iwopd_megatron.rollout import Prompt, Sampling
from iwopd_megatron.rollout.hf import HfEngine
from iwopd_megatron.runlog import MetricsLog
from iwopd_megatron.stop import stop_requested
from iwopd_megatron.sync import WeightStream
from iwopd_megatron.teacher import EmbeddedTeacher
from iwopd_megatron.trajectory import Trajectory, pack
from iwopd_megatron.weighting import token_weights

KEPT_SAMPLES = 8  # written to samples/ at every evaluation


class Trainer:
    """One run: its models, its data order, its folder."""

    def __init__(
        self, recipe: Recipe, parallel: Parallel, progress: Progress, resume: bool = False
    ):
        self.recipe, self.parallel, self.progress, self.run_folder = (
            recipe,
            parallel,
            progress,
            recipe.out,
        )
        self.tokenizer = AutoTokenizer.from_pretrained(recipe.student.hf)
        self._load_data()
        self._build_student()
        if recipe.teacher is not None:
            self._build_teacher()
        self.round, self.version, self.seconds = 0, 0, {}
        found = checkpoint.newest(self.run_folder) if resume else None
        if found is not None:
            self._restore(found)
        self.log = None
        if parallel.is_main:
            self.log = MetricsLog(self.run_folder, self.round if found else None)
            resolved = recipe.model_dump(mode="json")
            (self.run_folder / "recipe.yaml").write_text(yaml.safe_dump(resolved, sort_keys=False))

    def _load_data(self) -> None:
        recipe = self.recipe
        self.problems = read_problems(recipe.data.train, need_response=recipe.teacher is None)
        self.prompts = [
            encode_prompt(self.tokenizer, problem.question) for problem in self.problems
        ]
        kept = [
            i for i, ids in enumerate(self.prompts) if len(ids) <= recipe.rollout.max_prompt_tokens
        ]
        if len(kept) < len(self.problems):
            dropped = len(self.problems) - len(kept)
            self.progress.say(
                f"{dropped} prompts longer than rollout.max_prompt_tokens are left out."
            )
        self.kept = kept
        self.order = PromptOrder(len(kept), recipe.train.seed, recipe.data.shuffle)
        self.evaluator = None
        if recipe.data.eval is not None:
            self.evaluator = Evaluator(
                read_problems(recipe.data.eval)[: recipe.evaluate.problems],
                self.tokenizer,
                recipe.rollout.max_response_tokens,
                recipe.evaluate.temperature,
            )

    def _build_student(self) -> None:
        recipe, student = self.recipe, self.recipe.student
        self.hf = read_hf_config(student.hf)
        chunks = build_model(self.hf, self.parallel, student.dtype, student.recompute)
        if student.random_init is None:
            self.sources = HfTensors(student.hf)
        else:
            self.sources = random_weights(student.hf, student.random_init)
        load_shards(chunks, self.sources, self.hf, self.parallel)
        self.stream = WeightStream(chunks, self.hf, self.parallel)
        self.chunks = wrap_data_parallel(wrap_precision(chunks), recipe.train)
        self.optimizer = build_optimizer(self.chunks, recipe.train)
        self.scheduler = build_scheduler(self.optimizer, recipe.train)
        temperature = recipe.rollout.temperature if recipe.teacher is not None else 1.0
        self.schedule = Schedule(self.chunks, self.parallel, temperature)
        dtype = DTYPES[student.dtype]
        eos = self.tokenizer.eos_token_id
        self.engine = HfEngine(student.hf, dtype, {eos}, recipe.rollout.batch_size)

    def _build_teacher(self) -> None:
        recipe = self.recipe
        teacher_tokenizer = AutoTokenizer.from_pretrained(recipe.teacher.hf)
        gates.same_vocabulary(
            recipe.student.hf, recipe.teacher.hf, self.tokenizer, teacher_tokenizer
        )
        self.teacher = EmbeddedTeacher(
            recipe.teacher,
            self.parallel,
            recipe.rollout.temperature,
            recipe.train.microbatch_tokens,
        )

    def run(self) -> bool:
        """Train to the last round; False if a stop was asked for and the state saved instead."""
        recipe, first_line = self.recipe, {}
        self._publish()
        if self.round == 0:
            gates.first_weights(self.stream, self.sources)
            self._evaluate(first_line)
        while self.round < recipe.train.rounds:
            self.round += 1
            line = self._round()
            if self.round % recipe.evaluate.every == 0 or self.round == recipe.train.rounds:
                self._evaluate(line)
            stop = any_rank(stop_requested())
            due = recipe.checkpoint.every and self.round % recipe.checkpoint.every == 0
            if stop or due:
                self._save()
            if stop and self.round < recipe.train.rounds:
                return False
        if self.parallel.is_main:
            save_folder(self.run_folder / "hf", self.stream, recipe.student.hf)
            self.log.close()
        else:
            for _ in self.stream:
                pass
        return True

    def _round(self) -> dict[str, Any]:
        start = time.perf_counter()
        self.seconds = {}
        if self.recipe.teacher is None:
            samples, sizes = self._given_responses(), NLL_SUMS
        else:
            samples, sizes = self._own_responses(), POLICY_SUMS
        with self._phase("pack"):
            batches, length = pack(
                samples,
                self.parallel,
                self.recipe.train.microbatch_tokens,
                self.recipe.loss.aggregation,
            )
        with self._phase("train"):
            sums, grad_norm, lr = self._step(batches, length, sizes)
        with self._phase("sync"):
            self._publish()
        tokens = sums["tokens"].item()
        seconds = time.perf_counter() - start
        line = {
            "kind": "round",
            "round": self.round,
            "weight_version": self.version,
            "lr": lr,
            "grad_norm": grad_norm,
        }
        if self.recipe.teacher is None:
            line |= {"loss": sums["loss"].item(), "response_tokens": int(tokens)}
        else:
            line |= policy_means(sums) | _response_figures(samples)
            gates.drift(line["drift"], self.recipe.gates.max_drift)
        line |= {
            "tokens_per_second": tokens / seconds,
            "seconds": seconds,
            "time": dict(self.seconds),
        }
        self._write(line)
        self.progress.round(line)
        self.samples = samples
        return line

    def _own_responses(self) -> list[Trajectory]:
        recipe, vocab = self.recipe, self.hf["vocab_size"]
        chosen = [self.kept[i] for i in self.order.take(recipe.train.prompts_per_round)]
        prompts = [Prompt(i, self.prompts[problem]) for i, problem in enumerate(chosen)]
        sampling = Sampling(
            recipe.rollout.max_response_tokens,
            recipe.rollout.temperature,
            recipe.train.seed,
            self.round,
        )
        with self._phase("generate"):
            samples = self.engine.generate(prompts, sampling)
        gates.rollouts(samples, self.version, vocab)
        self.round_problems = [self.problems[i] for i in chosen]
        with self._phase("grade"):
            grades = grade_samples(samples, self.round_problems, self.tokenizer)
        with self._phase("score"):
            samples = self.teacher.score(samples)
        gates.teacher_scores(samples, vocab)
        return [
            replace(sample, correct=grade) for sample, grade in zip(samples, grades, strict=True)
        ]

    def _given_responses(self) -> list[Trajectory]:
        chosen = [self.kept[i] for i in self.order.take(self.recipe.train.prompts_per_round)]
        eos = self.tokenizer.eos_token_id
        return [
            Trajectory(
                index,
                self.prompts[problem],
                self.tokenizer.encode(self.problems[problem].response, add_special_tokens=False)
                + [eos],
            )
            for index, problem in enumerate(chosen)
        ]

    def _step(self, batches: list, length: int, sizes: dict[str, int]) -> tuple[dict, float, float]:
        """One optimiser step: forward and backward over micro-batches, clip, AdamW, schedule."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        objective = nll_objective
        if self.recipe.teacher is not None:
            objective = PolicyObjective(self.recipe.loss, self.parallel.cp.group)

        def on_output(hidden, model, batch):
            return objective(self.schedule.logprobs(hidden, model, batch), batch)

        kept = self.schedule.run(batches, length, on_output)
        sums = reduce_sums(kept, self.parallel, sizes)
        lr = self.optimizer.param_groups[0]["lr"]
        self.optimizer.prepare_grads()
        norm = float(self.optimizer.get_grad_norm())
        if math.isfinite(norm):
            self.optimizer.step()
        else:
            self.progress.say(
                f"round {self.round}: the gradient norm is {norm}; this optimiser step is skipped."
            )
        self.scheduler.step(1)
        return sums, norm, lr

    def _publish(self) -> None:
        """The student's weights after this round, as version `round`."""
        self.version = self.round
        self.engine.update(self.stream, self.version)

    def _evaluate(self, line: dict[str, Any]) -> None:
        if self.evaluator is None:
            return
        start = time.perf_counter()
        accuracy = self.evaluator.accuracy(self.engine)
        result = {
            "kind": "eval",
            "round": self.round,
            "accuracy": accuracy,
            "problems": len(self.evaluator.problems),
        }
        self._write(result | {"seconds": time.perf_counter() - start})
        self.progress.evaluation(result, line)
        if self.recipe.teacher is not None and self.round > 0:
            self._keep_samples()

    def _keep_samples(self) -> None:
        """Write a few of the round's samples with their gaps (against the engine) and weights."""
        if not self.parallel.is_main:
            return
        rule, lines = self.recipe.loss.weighting, []
        for sample, problem in list(zip(self.samples, self.round_problems, strict=True))[
            :KEPT_SAMPLES
        ]:
            gap = torch.tensor(sample.teacher_logp) - torch.tensor(sample.rollout_logp)
            weight = token_weights(
                gap[None], torch.ones(1, len(gap), dtype=torch.bool), **rule.model_dump()
            )[0]
            lines.append({
                "prompt": problem.question,
                "response": self.tokenizer.decode(sample.response_ids),
                "answer": problem.answer,
                "correct": bool(sample.correct),
                "tokens": [self.tokenizer.decode([token]) for token in sample.response_ids],
                "gap": gap.tolist(),
                "weight": weight.tolist(),
            })  # fmt: skip
        folder = self.run_folder / "samples"
        folder.mkdir(exist_ok=True)
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (folder / f"round_{self.round:06d}.jsonl").write_text(text, encoding="utf-8")

    def _save(self) -> None:
        extra = {"cursor": self.order.cursor, "world": self.parallel.world}
        checkpoint.save(
            self.run_folder, self.round, self.chunks, self.optimizer, self.scheduler,
            extra, self.parallel, self.recipe.checkpoint.keep,
        )  # fmt: skip

    def _restore(self, folder: Path) -> None:
        extra = checkpoint.load(folder, self.chunks, self.optimizer, self.scheduler, self.parallel)
        self.order.cursor, self.round = extra["cursor"], extra["round"]
        self.progress.say(f"resumed after round {self.round} from {folder}")

    def _write(self, line: dict[str, Any]) -> None:
        if self.log is not None:
            self.log.write(line)

    @contextlib.contextmanager
    def _phase(self, name: str):
        start = time.perf_counter()
        yield
        device.synchronize()
        self.seconds[name] = time.perf_counter() - start


def _response_figures(samples: list[Trajectory]) -> dict[str, float]:
    count = len(samples)
    return {
        "accuracy": sum(sample.correct for sample in samples) / count,
        "response_length": sum(len(sample.response_ids) for sample in samples) / count,
        "truncated": sum(sample.truncated for sample in samples) / count,
    }
