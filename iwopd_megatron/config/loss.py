"""The recipe's loss section: objective, advantage, token weights, masks."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeFloat

from iwopd_megatron.config.models import PositiveInt, Section


class Weighting(Section):
    rule: Literal[
        "uniform", "iw", "surrogate", "iw_signed", "log_ratio", "ratio", "ratio_blend", "linear",
        "prefix_boost", "prefix", "suffix", "schedule",
    ] = Field("iw", description="token weights w_t (loss/weighting.py); uniform: OPD")  # fmt: skip
    gamma: NonNegativeFloat = Field(
        0.5, description="iw, iw_signed, ratio_blend, linear, prefix_boost: strength (Eq. 17)"
    )
    alpha: float = Field(
        0.01, gt=0, le=1, description="ratio, ratio_blend: exponent of the prefix ratio (Eq. 46)"
    )
    share: float = Field(
        0.3, gt=0, le=1, description="prefix, suffix, prefix_boost: share of the response"
    )
    denominator: Literal["exclusive", "inclusive"] = Field(
        "exclusive",
        description="iw, surrogate: total of the gaps without the last token (Eq. 16) "
        "or with it (authors' code)",
    )
    start: float = Field(0.3, gt=0, le=1, description="schedule: prefix share of the first round")
    end: float = Field(1.0, gt=0, le=1, description="schedule: prefix share after the last round")
    anneal: Literal["cosine", "linear"] = Field(
        "cosine", description="schedule: how the share goes from start to end"
    )


class TopK(Section):
    """The dense variant's support: the teacher's K likeliest tokens at each position."""

    k: PositiveInt = Field(64, description="tokens of the support")
    support: Literal["renormalised", "tail", "truncated"] = Field(
        "renormalised",
        description="both models renormalised on the support, or a bucket for the rest of the "
        "vocabulary; truncated has neither and is not a divergence",
    )


class Loss(Section):
    """The objective, its advantage, the weights of its tokens, and which tokens it reads."""

    objective: Literal["policy", "topk_kl"] = Field(
        "policy",
        description="policy: the sampled token's advantage (the paper); topk_kl: "
        "KL(student || teacher) on the teacher's top K, differentiated as a loss",
    )
    advantage: Literal["sampled_gap", "topk_kl"] = Field(
        "sampled_gap", description="policy: teacher's minus student's log-prob of the sampled token"
    )
    extrapolation: float = Field(
        1.0,
        gt=0,
        description="policy: lambda of ExOPD, lambda (teacher - base) - (student - base); 1 is OPD",
    )
    weighting: Weighting = Weighting()
    clip: float = Field(
        0.2, gt=0, description="policy: PPO clip range; inert with one optimiser step a round"
    )
    dual_clip: float | None = Field(
        None,
        gt=1,
        description="policy: where the advantage is negative, a token's loss is at most this "
        "times -advantage (authors' code: 3.0); null: no bound",
    )
    tis_cap: float | None = Field(
        5.0,
        gt=0,
        description="policy: cap of the truncated importance weight trainer / engine; null: off",
    )
    aggregation: Literal["token_mean", "seq_mean_token_mean", "seq_mean_token_sum"] = Field(
        "seq_mean_token_mean",
        description="seq_mean_token_mean reproduces the paper: every response counts the same; "
        "token_mean: every token does",
    )
    mask_special_tokens: Literal["none", "all_but_eos", "all"] = Field(
        "none", description="tokens the tokenizer calls special that no loss and no sum reads"
    )
    mask_truncated: bool = Field(
        False, description="no loss reads a response that was cut at rollout.max_response_tokens"
    )
    topk: TopK = TopK()
