"""What the step transaction asks of the checks inside operations, and whom it tells of a micro-step that begins.

Never here: checks, seams, faults.
"""

from __future__ import annotations

import contextlib
from typing import Protocol

from resilience.abft.finding import Finding

__all__ = ["Listener", "Listeners", "Protector"]


class Protector(Protocol):
    """What the guard uses of `resilience.abft.protection.Protection`."""

    def begin_micro_step(self, step: int, micro_step: int, attempt: int) -> None: ...

    def active(self) -> contextlib.AbstractContextManager[None]: ...

    def paused(self) -> contextlib.AbstractContextManager[None]: ...

    def admit_backward(self, graph_task: int) -> None: ...

    def drain(self) -> list[Finding]: ...

    def checks(self) -> dict[str, int]: ...

    def new_shortfalls(self) -> list[str]: ...

    def residual_sample(self) -> list[float]: ...

    @property
    def check_seconds(self) -> float: ...


class Listener(Protocol):
    """Told of each micro-step as it begins: injectors of faults, the record of the last place."""

    def begin(self, step: int, micro_step: int, attempt: int) -> None: ...


Listeners = tuple[Listener, ...]
