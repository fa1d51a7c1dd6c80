"""Start the processes of a world on this machine.

Not by torchrun: its processes are new interpreters, which import everything anew and take commands,
not functions and queues.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing as mp

from iwopd_megatron.errors import RecipeError
from iwopd_megatron.runtime import device
from iwopd_megatron.runtime.services import free_port

MOST_LOCAL = 1024


def _enter(rank: int, world: int, port: int, function: Callable[..., Any], args: tuple) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_WORLD_SIZE=str(world),
    )
    if not device.has_gpu():
        torch.set_num_threads(1)
    function(*args)


def local_context() -> Any:
    """Return the multiprocessing context of `start_local`; queues for it must come from it.

    On a CPU processes are forked, so that imports are paid once; one with a GPU context cannot be.
    """
    return mp.get_context("spawn" if device.has_gpu() else "fork")


def start_local(world: int, function: Callable[..., Any], args: tuple = ()) -> mp.ProcessContext:
    """Start `function(*args)` on `world` local processes, with torchrun's variables set.

    Returns before they end. RecipeError if the machine cannot have so many.
    """
    if device.has_gpu() and world > device.gpu_count():
        raise RecipeError(
            f"{world} processes need as many GPUs, this machine has {device.gpu_count()}; "
            "choose a smaller layout, or set CUDA_VISIBLE_DEVICES= to run on CPUs."
        )
    if world > MOST_LOCAL:
        raise RecipeError(
            f"{world} processes are more than a machine can have; choose a smaller layout, or a "
            "cluster with 'iwopd launch'."
        )
    arguments = (world, free_port(), function, args)
    method = local_context().get_start_method()
    return mp.start_processes(_enter, arguments, world, join=False, start_method=method)
