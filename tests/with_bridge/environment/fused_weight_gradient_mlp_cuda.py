"""Stand-in for APEX: Megatron-Core only asks whether it is there."""
