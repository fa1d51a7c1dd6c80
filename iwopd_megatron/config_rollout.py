"""The recipe's rollout section: who writes the answers, and how."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt

from iwopd_megatron.config_models import Section


class Rollout(Section):
    engine: Literal["hf"] = Field("hf", description="hf: embedded, split over the ranks")
    max_prompt_tokens: PositiveInt = Field(
        2048, description="longer prompts are filtered out, never cut"
    )
    max_response_tokens: PositiveInt = Field(
        16384, description="generation stops here (counted as truncated)"
    )
    temperature: float = Field(
        1.0, gt=0, description="sampling temperature; teacher scores use it too"
    )
    top_p: float = Field(
        1.0, gt=0, le=1, description="sample from the likeliest tokens of this joint probability"
    )
    batch_size: PositiveInt = Field(512, description="prompts one rank generates for at a time")
