"""Tokens drawn from logits, by inverting the cumulative distribution at one number in [0, 1).

The number is a function of (seed, stream, prompt, position); sums are in double precision. Shapes:
B rows, V vocabulary.
"""

from __future__ import annotations

import numpy
import torch

from iwopd_megatron.rollout.engine import Sampling

CACHED = 2**17  # logits; on a CPU what is made of so many stays in a core's cache


def uniform_numbers(sampling: Sampling, index: int) -> numpy.ndarray:
    """Return `[max_tokens]` numbers in [0, 1), a function of (seed, stream, index) alone."""
    key = numpy.random.SeedSequence([sampling.seed, sampling.stream, index])
    return numpy.random.Generator(numpy.random.Philox(key)).random(sampling.max_tokens)


def draw(
    logits: torch.Tensor, uniform: torch.Tensor, sampling: Sampling
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw a token of each row of `[B, V]`, fp32; return ids and log-probs `[B]`.

    Log-probs are at the temperature, at 1 when greedy. uniform: `[B]` in [0, 1).
    """
    rows, size = logits.shape
    together = rows if logits.is_cuda else max(1, torch.get_num_threads() * CACHED // size)
    parts = zip(logits.split(together), uniform.split(together), strict=True)
    tokens, logps = zip(*(_draw_rows(*part, sampling) for part in parts), strict=True)
    return torch.cat(tokens), torch.cat(logps)


def _draw_rows(
    logits: torch.Tensor, uniform: torch.Tensor, sampling: Sampling
) -> tuple[torch.Tensor, torch.Tensor]:
    if sampling.temperature not in (0, 1):
        logits = logits / sampling.temperature
    logp = logits.log_softmax(-1)
    if sampling.temperature == 0:
        token = logp.argmax(-1)
    else:
        prob = _nucleus(logp.double().exp_(), sampling.top_p)
        cdf = torch.cumsum(prob, -1, out=prob)
        token = torch.searchsorted(cdf, (uniform * cdf[:, -1])[:, None], right=True).squeeze(1)
        token = token.clamp(max=logp.shape[-1] - 1)
    return token, logp.gather(-1, token[:, None]).squeeze(1)


def _nucleus(prob: torch.Tensor, top_p: float) -> torch.Tensor:
    """Return `[B, V]`, zero but at the fewest likeliest tokens whose sum reaches `top_p`."""
    if top_p == 1:
        return prob
    ordered, order = prob.sort(-1, descending=True)
    is_kept = ordered.cumsum(-1) - ordered < top_p
    return torch.zeros_like(prob).scatter(-1, order, ordered * is_kept)
