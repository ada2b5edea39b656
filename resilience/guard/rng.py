"""The states of every generator that a training step may draw from: captured, and put back.

torch on the CPU, torch on each device of this process, numpy, Python's `random`, and what else a source brings.
Capturing reads host memory only: nothing waits for a device.
"""

from __future__ import annotations

import dataclasses
import random
from typing import Any, Protocol

import numpy as np
import torch

__all__ = ["RngSnapshot", "RngSource", "capture_rng", "restore_rng"]


class RngSource(Protocol):
    """A holder of further generator states; `resilience.deepspeed.adapter.EngineAdapter` is one."""

    def rng_states(self) -> dict[str, torch.Tensor]: ...

    def set_rng_states(self, states: dict[str, torch.Tensor]) -> None: ...


@dataclasses.dataclass(frozen=True, slots=True)
class RngSnapshot:
    """All generator states at one moment."""

    cpu: torch.Tensor
    devices: tuple[torch.Tensor, ...]
    numpy: Any
    python: Any
    tracked: dict[str, torch.Tensor]


def capture_rng(source: RngSource) -> RngSnapshot:
    """The states as they are now."""
    return RngSnapshot(
        cpu=torch.get_rng_state(),
        devices=(torch.cuda.get_rng_state(),) if torch.cuda.is_initialized() else (),  # type: ignore[no-untyped-call]
        numpy=np.random.get_state(),
        python=random.getstate(),
        tracked=source.rng_states(),
    )


def restore_rng(snapshot: RngSnapshot, source: RngSource) -> None:
    """Put every generator back to where it was at `snapshot`."""
    torch.set_rng_state(snapshot.cpu)
    for state in snapshot.devices:
        torch.cuda.set_rng_state(state)
    np.random.set_state(snapshot.numpy)
    random.setstate(snapshot.python)
    source.set_rng_states(snapshot.tracked)
