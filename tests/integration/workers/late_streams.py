"""A device that works when it is told to, for a copier of snapshots where there is no GPU.

Tensors of the CPU are on the device, as far as a copier sees. What the stream beside the script's is given is done when
an event is waited for, or when `run` is called, and not before: what changes in between shows in the copy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from resilience.snapshot.copiers import Bytes, Event

__all__ = ["LateStreams"]


@dataclasses.dataclass(eq=False)
class _Event:
    streams: LateStreams
    work: Callable[[], None] | None
    at_ms: float = 0.0

    def query(self) -> bool:
        return self.work is None

    def synchronize(self) -> None:
        """Everything that was given to the stream before is done, too."""
        if self.work is not None:
            self.streams.log.append("wait")
            self.streams.run(until=self)

    def elapsed_time(self, end_event: Any) -> float:
        return float(end_event.at_ms - self.at_ms)


class LateStreams:
    """Implements `resilience.snapshot.copiers.Streams`. The script's own stream has always done what it was given.

    Args:
        refuses: what is said when memory is to be page-locked; "" to lock it.
    """

    takes_ms = 0.0
    """How long anything takes on the stream beside."""

    def __init__(self, refuses: str = "") -> None:
        self.refuses = refuses
        self.locked: set[int] = set()
        self.log: list[str] = []
        """What was asked for, in its order."""
        self.now_ms = 0.0
        self._waiting: list[_Event] = []

    def serves(self, source: torch.Tensor) -> bool:
        return True

    def lock(self, memory: Bytes) -> str:
        if not self.refuses:
            self.locked.add(memory.ctypes.data)
        return self.refuses

    def unlock(self, memory: Bytes) -> None:
        self.locked.remove(memory.ctypes.data)

    def flag(self) -> torch.Tensor:
        return torch.zeros((), dtype=torch.bool)

    def beside(self, work: Callable[[], None]) -> Event:
        self.log.append("beside")
        event = _Event(self, work)
        self._waiting.append(event)
        return event

    def mark(self) -> Event:
        return _Event(self, None, self.now_ms)

    def hold(self, event: Event) -> None:
        """Nothing is run beside the script here: what its stream would wait for happens now."""
        assert isinstance(event, _Event)
        self.log.append("hold")
        self.run(until=event)

    def run(self, until: _Event | None = None) -> None:
        """The device does all that waits, or what waits up to this."""
        while self._waiting and (until is None or until.work is not None):
            event = self._waiting.pop(0)
            assert event.work is not None
            event.work()
            self.now_ms += self.takes_ms
            event.work, event.at_ms = None, self.now_ms
