"""The token weights under the name that others import: `iwopd_megatron.loss.weighting`."""

from iwopd_megatron.loss.weighting import token_weights, token_weights_packed

__all__ = ["token_weights", "token_weights_packed"]
