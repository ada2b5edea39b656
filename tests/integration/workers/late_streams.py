"""A device whose copies happen when they are told to, for a copier of snapshots where there is no GPU.

Tensors of the CPU are on the device, as far as a copier sees. `copy` notes what is to be copied; the bytes go when the
event is waited for, or when `run` is called, and not before: what changes in between shows in the copy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from resilience.snapshot.copiers import Bytes, Event, Pair

__all__ = ["LateStreams"]


@dataclasses.dataclass(eq=False)
class _Copy:
    streams: LateStreams
    pairs: list[Pair]
    is_done: bool = False

    def query(self) -> bool:
        return self.is_done

    def synchronize(self) -> None:
        """Everything that was given to the stream before is copied, too."""
        if not self.is_done:
            self.streams.log.append("wait")
            self.streams.late_bytes += sum(len(target) for target, _ in self.pairs)
            self.streams.run(until=self)


class LateStreams:
    """Implements `resilience.snapshot.copiers.Streams`.

    Args:
        refuses: what is said when memory is to be page-locked; "" to lock it.
    """

    def __init__(self, refuses: str = "") -> None:
        self.refuses = refuses
        self.locked: set[int] = set()
        self.log: list[str] = []
        """What was asked for, in its order."""
        self.late_bytes = 0
        """Copied when they were waited for; not those that the script's stream waited for."""
        self._waiting: list[_Copy] = []

    def serves(self, source: torch.Tensor) -> bool:
        return True

    def lock(self, memory: Bytes) -> str:
        if not self.refuses:
            self.locked.add(memory.ctypes.data)
        return self.refuses

    def unlock(self, memory: Bytes) -> None:
        self.locked.remove(memory.ctypes.data)

    def copy(self, pairs: Sequence[Pair]) -> Event:
        self.log.append("copy")
        event = _Copy(self, list(pairs))
        self._waiting.append(event)
        return event

    def hold(self, event: Event) -> None:
        """Nothing is run beside the script here: what its stream would wait for happens now."""
        assert isinstance(event, _Copy)
        self.log.append("hold")
        self.run(until=event)

    def join(self) -> None:
        self.log.append("join")

    def run(self, until: _Copy | None = None) -> None:
        """The device copies all that waits, or up to this one."""
        while self._waiting and (until is None or not until.is_done):
            copy = self._waiting.pop(0)
            for target, source in copy.pairs:
                torch.from_numpy(target).copy_(source)
            copy.pairs, copy.is_done = [], True
