"""On-policy distillation of large MoE models with discrepancy-weighted tokens, on Megatron-Core."""

__version__ = "0.1.0"
