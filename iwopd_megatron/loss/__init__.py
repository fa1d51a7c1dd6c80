"""The loss of on-policy distillation: token log-probs, advantage, token weights, policy loss.

In come logits or hidden states and the teacher's log-probs, as tensors; out go losses and
gradients, exact under tensor and context parallelism. Knows nothing of recipes, samples or the
trainer, so any trainer can use it: on a plain padded batch `opd_advantage`, `token_weights` and
`policy_loss` are all it takes.
"""

from typing import TYPE_CHECKING, Any

from iwopd_megatron.loss.policy import opd_advantage, policy_loss
from iwopd_megatron.loss.weighting import token_weights, token_weights_packed

if TYPE_CHECKING:
    from iwopd_megatron.loss.logprobs import linear_logprobs

__all__ = [
    "linear_logprobs",
    "opd_advantage",
    "policy_loss",
    "token_weights",
    "token_weights_packed",
    # files that other rooms import
    "linear_loss",
    "logprobs",
    "policy",
    "topk",
    "weighting",
]


def __getattr__(name: str) -> Any:
    """Import the LM head when it is asked for: it brings Megatron, which the rest does without."""
    if name == "linear_logprobs":
        from iwopd_megatron.loss.logprobs import linear_logprobs

        return linear_logprobs
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
