"""Processes and devices: the GPU or its stand-ins, process groups, servers beside a run, signals.

In come a layout and commands; out go initialised process groups, worlds on this machine, and
servers that are started again when they die. `device` is the only file that knows CUDA from CPU.
Megatron-Core is imported by `megatron`; only stand_ins.py, which replaces parts of it on CPUs, does
so too. `versions` says which versions of it and others were tested.
"""

__all__ = [
    "background",
    "device",
    "host",
    "keeper",
    "local_world",
    "main_only",
    "megatron",
    "parallel",
    "quiet",
    "services",
    "stop",
    "versions",
]
