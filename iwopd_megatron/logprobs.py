"""The LM head's log-probs under the name that others import: `iwopd_megatron.loss.logprobs`."""

from iwopd_megatron.loss.logprobs import linear_logprobs

__all__ = ["linear_logprobs"]
