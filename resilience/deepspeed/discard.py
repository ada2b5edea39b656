"""Throws away or holds on to the gradients of one step, wherever DeepSpeed keeps them at the boundary.

One function for each kind of optimizer wrapper in DeepSpeed 0.19.8; what each one resets is what the wrapper's own
`step` resets, plus its path for an overflow: as if the backward passes had never run. Never here: weights, optimizer
moments, loss scales, counters of steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID, DeepSpeedZeroOptimizer

__all__ = ["discard_gradients", "keep_gradients"]


@torch.no_grad()
def discard_gradients(engine: Any) -> None:
    """Drop every gradient of `engine` (a `DeepSpeedEngine`), reduced or not, on this rank."""
    engine.zero_grad()
    optimizer = engine.optimizer
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        _discard_stage3(optimizer)
    elif isinstance(optimizer, DeepSpeedZeroOptimizer):
        _discard_stage1_and_2(optimizer)
    elif isinstance(optimizer, BF16_Optimizer):
        optimizer.zero_grad(set_to_none=True)


def _discard_stage1_and_2(optimizer: DeepSpeedZeroOptimizer) -> None:
    optimizer.zero_grad(set_to_none=True)
    # Partitions that live across steps are handed back before their names are dropped.
    optimizer._release_preflattened_grad_buffers()
    optimizer.averaged_gradients.clear()
    optimizer.all_grad_tensors.clear()
    optimizer._clear_previous_reduced_grads()
    optimizer.params_already_reduced[:] = [False] * len(optimizer.params_already_reduced)
    for bucket in optimizer.ipg_buckets.values():
        bucket.clear()
    optimizer._release_ipg_buffers()
    optimizer.ready_for_gradients = False
    optimizer.micro_step_id = INITIAL_MICRO_STEP_ID
    optimizer._epilogue_ran_this_backward = False
    if optimizer.cpu_offload:
        optimizer.reset_cpu_buffers()
        optimizer._offload_accumulated_param_ids = set()


def _discard_stage3(optimizer: DeepSpeedZeroOptimizer_Stage3) -> None:
    # Resets micro_step_id too, so that the next backward copies into the partitions instead of adding to them.
    optimizer.zero_grad(set_to_none=True)
    optimizer.averaged_gradients = {}
    optimizer.inf_or_nan_tracker.zero_()
    for bucket in optimizer.ipg_buckets.values():
        bucket.clear_params()
    for param_id in optimizer.params_already_reduced:
        optimizer.params_already_reduced[param_id] = False
    if optimizer.offload_optimizer:
        optimizer.reset_cpu_buffers()
        optimizer._offload_boundary_param_ids = set()


@torch.no_grad()
def keep_gradients(engine: Any) -> Callable[[], None]:
    """Hold on to the gradients as they are at the boundary; the returned callable puts them back in place of others."""
    optimizer = engine.optimizer
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        return _keep_buffers(
            [optimizer.grad_partitions_flat_buffer, *_offloaded(optimizer.fp32_partitioned_groups_flat)]
        )
    if isinstance(optimizer, DeepSpeedZeroOptimizer):
        return _keep_stage1_and_2(optimizer)
    if isinstance(optimizer, BF16_Optimizer):
        return _keep_buffers(optimizer.fp32_groups_gradients_flat)
    return _keep_grads(engine)


def _keep_stage1_and_2(optimizer: DeepSpeedZeroOptimizer) -> Callable[[], None]:
    # A replay makes new tensors for these; the offloaded ones it overwrites.
    averaged = dict(optimizer.averaged_gradients)
    norms = dict(getattr(optimizer, "norm_for_param_grads", {}))
    put_back = _keep_buffers(_offloaded(optimizer.single_partition_of_fp32_groups))

    def restore() -> None:
        optimizer.averaged_gradients.clear()
        optimizer.averaged_gradients.update(averaged)
        if optimizer.cpu_offload:
            optimizer.norm_for_param_grads = norms
        put_back()

    return restore


def _keep_grads(engine: Any) -> Callable[[], None]:
    held = [(parameter, parameter.grad) for parameter in engine.module.parameters()]

    def restore() -> None:
        for parameter, grad in held:
            parameter.grad = grad

    return restore


def _keep_buffers(buffers: list[torch.Tensor]) -> Callable[[], None]:
    held = [(buffer, buffer.clone()) for buffer in buffers]

    def restore() -> None:
        for buffer, copy in held:
            buffer.copy_(copy)

    return restore


def _offloaded(masters: list[torch.Tensor]) -> list[torch.Tensor]:
    return [master.grad for master in masters if master.grad is not None]
