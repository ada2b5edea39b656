"""Throws away the gradients of one step, wherever DeepSpeed keeps them, as if its backward passes had never run.

One function for each kind of optimizer wrapper in DeepSpeed 0.19.8; what each one resets is what the wrapper's own
`step` resets, plus its path for an overflow. Never here: weights, optimizer moments, loss scales, counters of steps.
"""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID, DeepSpeedZeroOptimizer

__all__ = ["discard_gradients"]


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
