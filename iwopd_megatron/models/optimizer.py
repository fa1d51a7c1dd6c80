"""Megatron's (distributed) AdamW and learning-rate schedule, with or without TE or Apex."""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy

import torch
from torch.optim.adam import adam
from torch.optim.adamw import adamw

from iwopd_megatron.config.recipe import Train
from iwopd_megatron.models.whole_states import keep_in_place
from iwopd_megatron.runtime import device
from iwopd_megatron.runtime.megatron import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    MegatronModule,
    OptimizerParamScheduler,
    finalize_model_grads,
    megatron_clip_grads,
    megatron_distributed,
    megatron_optimizer,
)

STEP_BYTES = 64 * 2**20  # on a CPU; one call is quicker for many small tensors


class FusedAdam(torch.optim.Optimizer):
    """AdamW with its step count in the parameter group, as Megatron expects of Apex and TE."""

    def __init__(
        self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, adam_w_mode=True, **_
    ):  # since 0.17 also `capturable`: in a CUDA graph, which is refused elsewhere
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, step=0)
        super().__init__(params, defaults)
        self.update = adamw if adam_w_mode else adam

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            done = group["step"]
            group["step"] = done + 1
            for some in [params] if device.has_gpu_kernels() else _runs(params):
                self._step(group, some, done)

    def _step(self, group, params, done):
        on_gpu = device.has_gpu_kernels()
        self.update(
            params,
            [p.grad for p in params],
            [self.state[p]["exp_avg"] for p in params],
            [self.state[p]["exp_avg_sq"] for p in params],
            [],
            list(torch.full((len(params),), float(done), device=params[0].device).unbind()),
            foreach=not on_gpu,
            fused=on_gpu or None,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def _runs(params: list[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Yield parameters in runs of STEP_BYTES, or one: the step has a temporary of a run's size."""
    run: list[torch.Tensor] = []
    size = 0
    for one in params:
        if run and size + one.nbytes > STEP_BYTES:
            yield run
            run, size = [], 0
        run.append(one)
        size += one.nbytes
    yield run


def _use_fused_adam() -> None:
    if not megatron_distributed.HAVE_APEX_OR_TE:
        megatron_optimizer.Adam = megatron_distributed.Adam = FusedAdam
        megatron_optimizer.USING_PYTORCH_OPTIMIZER = False
        megatron_distributed.HAVE_APEX_OR_TE = megatron_distributed.USING_APEX_OPTIMIZER = True


def _clip_on_the_device() -> None:
    """Have Megatron's own norm and scaling of many gradients, where no library has them, be ours.

    Its norm reads every gradient's on the host, its scaling holds a copy of all gradients.
    """
    if megatron_clip_grads.l2_norm_impl.__name__ == "local_multi_tensor_l2_norm":
        megatron_clip_grads.l2_norm_impl = _norm_of_all
        megatron_clip_grads.multi_tensor_scale_impl = _scale_all


def _norm_of_all(_chunk, _flag, tensor_lists, *_) -> tuple[torch.Tensor, None]:
    """Return the Euclidean norm of all tensors together, fp32 `[1]`, as Apex's function does."""
    norms = torch._foreach_norm([x for tensors in tensor_lists for x in tensors])
    return torch.linalg.vector_norm(torch.stack(norms).float())[None], None


def _scale_all(_chunk, _flag, tensor_lists, scale: float) -> None:
    """Write the first tensors times `scale` to the second, which may be the same."""
    for source, target in zip(*tensor_lists, strict=True):
        torch.mul(source, scale, out=target)


def wrap_data_parallel(chunks: list[MegatronModule], train: Train) -> list[DistributedDataParallel]:
    """Return Megatron's DDP around each chunk; it sums gradients over ranks in fp32, unscaled."""
    config = chunks[0].config
    ddp_config = DistributedDataParallelConfig(
        use_distributed_optimizer=train.distributed_optimizer, grad_reduce_in_fp32=True
    )
    wrapped = [DistributedDataParallel(config, ddp_config, chunk) for chunk in chunks]
    config.finalize_model_grads_func = _finalize
    return wrapped


def _finalize(model, num_tokens=None, **kwargs) -> None:
    """Reduce gradients, undivided: the loss already carries its global denominator."""
    finalize_model_grads(model, None, **kwargs)


def build_optimizer(wrapped: list[DistributedDataParallel], train: Train):
    """Return Megatron's AdamW over the wrapped chunks, sharded over data-parallel ranks if set."""
    _use_fused_adam()
    _clip_on_the_device()
    config = wrapped[0].config
    optimizer = megatron_optimizer.get_megatron_optimizer(
        megatron_optimizer.OptimizerConfig(
            optimizer="adam",
            lr=train.lr,
            min_lr=train.min_lr,
            weight_decay=train.weight_decay,
            adam_beta1=train.betas[0],
            adam_beta2=train.betas[1],
            adam_eps=train.eps,
            clip_grad=train.clip_grad,
            use_distributed_optimizer=train.distributed_optimizer,
            bf16=config.bf16,
            params_dtype=config.params_dtype,
        ),
        wrapped,
    )
    config.grad_scale_func = optimizer.scale_loss
    for part in optimizer.chained_optimizers:
        part.init_state_fn(part.optimizer, part.config)  # a checkpoint may come before any step
    keep_in_place(optimizer)
    _gather_once(optimizer.chained_optimizers)
    return optimizer


def _gather_once(chained: list) -> None:
    """Have the last of Megatron's optimizers alone gather parameters after a step.

    Experts have one of their own, and each gathers the parameters of all: a model with experts
    would have them gathered twice a step. What is gathered later needs no gathering now.
    """
    for part in chained[:-1]:
        if isinstance(part, megatron_distributed.DistributedOptimizer):
            part.ddp_config = copy(part.ddp_config)
            part.ddp_config.overlap_param_gather = True


def build_scheduler(optimizer, train: Train) -> OptimizerParamScheduler:
    """Return the schedule at its first round: linear warm-up, then constant or cosine."""
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=train.lr,
        min_lr=train.min_lr,
        lr_warmup_steps=train.warmup_rounds,
        lr_decay_steps=max(train.rounds, train.warmup_rounds + 1),
        lr_decay_style=train.schedule,
        start_wd=train.weight_decay,
        end_wd=train.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )
    scheduler.step(1)
    return scheduler


def go_on(scheduler: OptimizerParamScheduler, steps: int) -> None:
    """Move to the place after `steps` of the schedule that the scheduler was built with.

    Its own `load_state_dict` would bring back the saved run's schedule, horizon included.
    """
    scheduler.num_steps = steps
    scheduler.step(0)
