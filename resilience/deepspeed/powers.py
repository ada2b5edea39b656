"""Powers of Adam's betas that DeepSpeed's compiled optimizers keep to themselves on a CPU, brought back after a load.

`DeepSpeedCPUAdam` and, on a CPU, `FusedAdam` multiply βᵗ up from step to step, in float32, inside their library
(csrc/includes/cpu_adam.h, `IncrementStep`). It is in no checkpoint: after a load the next step begins with pow(β, t),
which differs in the last bits, and so does everything after it. Calling the library for the steps in between, with
tensors of no elements, makes it multiply again. On CUDA the power is computed anew in each step, as in torch's Adam.

Where betas change from step to step the library begins with pow(β, t) each time, and there is nothing to bring back.
"""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

__all__ = ["NAME", "bring_back", "loaded", "origin"]

NAME = "powers_begin"
"""What an origin is called among the counters of a checkpoint or a snapshot."""
_ATTRIBUTE = "_resilience_powers_begin"


def origin(engine: Any) -> int:
    """The optimizer's own count of steps at which its powers began: what it had loaded, or 0."""
    return int(vars(engine).get(_ATTRIBUTE, 0))


def loaded(engine: Any) -> None:
    """DeepSpeed has loaded a checkpoint: powers begin there, as they do without this package."""
    vars(engine)[_ATTRIBUTE] = _num_steps(_base(engine))


def bring_back(engine: Any, begin: int) -> None:
    """Have the library multiply from `begin`, an `origin`, to where the optimizer stands now."""
    optimizer = _base(engine)
    vars(engine)[_ATTRIBUTE] = begin
    if isinstance(optimizer, DeepSpeedCPUAdam):
        for group in optimizer.param_groups:
            for step in range(begin + 1, _num_steps(optimizer) + 1):
                _cpu_adam(optimizer, group, step)
    elif isinstance(optimizer, FusedAdam) and _is_on_cpu(optimizer):
        for group in optimizer.param_groups:
            for step in range(begin + 1, _num_steps(optimizer) + 1):
                _fused_adam(optimizer, group, step)


def _base(engine: Any) -> Any:
    """The optimizer below DeepSpeed's wrappers."""
    optimizer = engine.optimizer
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def _num_steps(optimizer: Any) -> int:
    """Steps that the optimizer has counted; 0 before its first one."""
    counts = [int(state["step"]) for state in getattr(optimizer, "state", {}).values() if "step" in state]
    return max(counts, default=0)


def _is_on_cpu(optimizer: Any) -> bool:
    return all(p.device.type == "cpu" for group in optimizer.param_groups for p in group["params"])


def _cpu_adam(optimizer: Any, group: dict[str, Any], step: int) -> None:
    nothing = [torch.empty(0) for _ in range(4)]
    beta1, beta2 = group["betas"]
    settings = group["eps"], group["weight_decay"], group["bias_correction"]
    optimizer.ds_opt_adam.adam_update(optimizer.opt_id, step, group["lr"], beta1, beta2, *settings, *nothing)


def _fused_adam(optimizer: Any, group: dict[str, Any], step: int) -> None:
    nothing = [[torch.empty(0)] for _ in range(4)]
    beta1, beta2 = group["betas"]
    correction = 1 if group["bias_correction"] else 0
    flag = torch.zeros(1, dtype=torch.int)
    optimizer.multi_tensor_adam(
        0, flag, nothing, group["lr"], beta1, beta2, group["eps"], step, optimizer.adam_w_mode, correction,
        group["weight_decay"],
    )  # fmt: skip
