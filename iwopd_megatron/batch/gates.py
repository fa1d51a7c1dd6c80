"""Truth gates: what must hold before a round may train. Each raises GateError with one sentence."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from iwopd_megatron.batch.trajectory import Trajectory
from iwopd_megatron.errors import GateError
from iwopd_megatron.hf.config import HfConfig

TRUNCATION_ROUNDS = 10  # whose mean is the usual share of truncated answers


def rollouts(
    samples: list[Trajectory], version: int, vocab_size: int, max_staleness: int = 0
) -> None:
    """Every answer is by the believed weights, not empty and inside the vocabulary.

    max_staleness: versions before `version` that may have written a part of it.
    """
    for sample in samples:
        if not version - max_staleness <= sample.weight_version <= version:
            raise GateError(
                f"sample {sample.index} was written by weight version {sample.weight_version}, "
                f"not {version}; the engine did not take the last update."
            )
        if not sample.response_ids or len(sample.rollout_logp) != len(sample.response_ids):
            raise GateError(
                f"sample {sample.index} has {len(sample.response_ids)} tokens but "
                f"{len(sample.rollout_logp)} engine log-probs; each token needs one."
            )
        if not 0 <= min(sample.response_ids) <= max(sample.response_ids) < vocab_size:
            raise GateError(
                f"sample {sample.index} holds a token id outside the vocabulary of {vocab_size}."
            )


def routes(samples: list[Trajectory], hf: HfConfig) -> None:
    """Every answer brings the engine's experts for all its inputs and layers."""
    for sample in samples:
        expected = sample.inputs, hf.num_hidden_layers, hf.num_experts_per_tok
        found = None if sample.experts is None else sample.experts.shape
        if found != expected:
            raise GateError(
                f"sample {sample.index} came with experts of shape {found}, expected {expected} "
                "(inputs, layers, top k); start every rollout server with "
                "--enable-return-routed-experts, or set rollout.routing_replay=false."
            )


def bad_teacher_score(sample: Trajectory) -> float | None:
    """The first teacher log-prob that a loss reads and that is no finite number <= 0."""
    for value, is_read in zip(sample.teacher_logp, sample.is_read, strict=True):
        if is_read and (not math.isfinite(value) or value > 1e-4):
            return value
    return None


def without_bad_scores(samples: list[Trajectory]) -> list[Trajectory]:
    """The samples, those with an impossible teacher log-prob kept from every loss."""
    return [sample if bad_teacher_score(sample) is None else sample.unread() for sample in samples]


def teacher_scores(samples: list[Trajectory], vocab_size: int) -> None:
    """Teacher log-probs are finite, not positive, and not one constant such as -log V.

    Where no loss reads a token it has none.
    """
    values = []
    for sample in samples:
        if len(sample.teacher_logp) != len(sample.response_ids):
            raise GateError(
                f"sample {sample.index} has {len(sample.response_ids)} tokens but "
                f"{len(sample.teacher_logp)} teacher log-probs; each token needs one."
            )
        bad = bad_teacher_score(sample)
        if bad is not None:
            raise GateError(
                f"sample {sample.index}: teacher log-prob {bad} is not a finite number <= 0; "
                "check the teacher's weights and dtype, or set gates.on_bad_sample=drop."
            )
        scores = zip(sample.teacher_logp, sample.is_read, strict=True)
        values += [value for value, is_read in scores if is_read]
    if len(values) > 1 and max(values) - min(values) < 1e-6:
        uniform = (
            " (= -log V: its head or weights were not loaded)"
            if abs(values[0] + math.log(vocab_size)) < 1e-3
            else ""
        )
        raise GateError(
            f"all {len(values)} teacher log-probs are {values[0]:.4f}{uniform}; "
            "the teacher scores nothing."
        )


def first_weights(streamed: Iterable[tuple[str, torch.Tensor]], sources: Mapping[str, Any]) -> None:
    """The first published weights are the student's own tensors, all of them, bit for bit."""
    missing = set(sources)
    for name, tensor in streamed:
        source = sources[name]
        expected = source if isinstance(source, torch.Tensor) else source[:]
        if not torch.equal(tensor.cpu(), expected.to(tensor.dtype)):
            raise GateError(
                f"published tensor {name} is not the student's; "
                "the layout's weight mapping is wrong."
            )
        missing.discard(name)
    if missing:
        raise GateError(
            f"{len(missing)} of the student's tensors are never published, e.g. {min(missing)}; "
            "the weight table lacks a row for it."
        )


def drift(mean_drift: float, limit: float) -> None:
    """Trainer and engine agree on the log-probs of the sampled tokens."""
    if not mean_drift <= limit:
        raise GateError(
            f"engine and trainer log-probs differ by {mean_drift:.3g} nats on average, "
            f"limit gates.max_drift={limit}; "
            "engine and trainer do not hold the same weights, temperature or dtype."
        )


def canary(trainer: list[float], engine: Mapping[str, list[float]], limit: float) -> float:
    """Every engine scores a fixed prompt as the trainer does; the largest mean difference (nats).

    engine: log-probs by the server's URL.
    """
    worst = 0.0
    for url, theirs in engine.items():
        mean = sum(abs(a - b) for a, b in zip(trainer, theirs, strict=True)) / len(trainer)
        if not mean <= limit:
            raise GateError(
                f"{url} scores a canary prompt {mean:.3g} nats from the trainer on average, limit "
                f"gates.max_canary={limit:g}; it does not hold the weights that were pushed, or "
                "its dtype differs."
            )
        worst = max(worst, mean)
    return worst


def truncation(before: list[float], samples: list[Trajectory], limit: float) -> None:
    """The share of answers cut at the length limit does not jump above that of recent rounds."""
    recent = before[-TRUNCATION_ROUNDS:]
    if not recent:
        return
    share = sum(sample.truncated for sample in samples) / len(samples)
    usual = sum(recent) / len(recent)
    if share - usual > limit:
        raise GateError(
            f"{share:.0%} of the answers are cut at rollout.max_response_tokens, {usual:.0%} in "
            f"the rounds before, limit gates.max_truncation_jump={limit:g}; the student forgot to "
            "stop, or the engine lost its EOS: look at the last samples."
        )
