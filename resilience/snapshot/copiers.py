"""Brings the bytes of storages on a device into the mapped files of a slot: at once, or beside the training.

`StreamCopier` copies on a stream of its own into page-locked memory. What a forward may change is copied first, and the
device goes on with the script's work only when it has been; what only an optimizer step changes is copied from the next
forward on, and waited for before the step. That nothing changed it meanwhile is checked: hashes of its bits, taken on
the device with the snapshot, when the copy begins and when it has ended, must agree. Never here: files, commits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from resilience.kernels.hashing import bit_hash

__all__ = ["Bytes", "Copier", "CudaStreams", "Event", "Pair", "StreamCopier", "Streams", "WaitingCopier", "copier_for"]

Bytes = np.ndarray[Any, np.dtype[np.uint8]]

Pair = tuple[Bytes, torch.Tensor]
"""(target in mapped memory, source on the device), both (n,) uint8."""

Lasting = Callable[[], frozenset[int]]
"""Gives the storages, by identity, that nothing but an optimizer step or the script changes."""


class Copier(Protocol):
    """Copies the storages of one snapshot after the other: `begin`, `copy` for each, `seal`; then `go_on` at each
    forward while it `is_copying`, and `finish`."""

    problem: str
    """Why all copies are waited for although they need not be; empty where that is not so."""

    @property
    def is_copying(self) -> bool:
        """Whether something of the snapshot is still to be copied."""

    def admit(self, memory: Bytes) -> None:
        """A file is mapped here, and will be copied into."""

    def release(self, memory: Bytes) -> None:
        """It is about to be unmapped."""

    def serves(self, source: torch.Tensor) -> bool:
        """Whether this is to be copied by `copy`; else it lies where the processor can read it."""

    def begin(self, lasting: Lasting) -> None:
        """A snapshot begins; one that was not finished is dropped."""

    def copy(self, target: Bytes, source: torch.Tensor) -> None:
        """Copy it, now or later."""

    def seal(self) -> None:
        """All of the snapshot was given to `copy`. Whatever the script changes from now on is no part of it."""

    def go_on(self) -> None:
        """A forward is about to begin: nothing changes the lasting storages until `finish`, or `finish` will tell."""

    def join(self) -> None:
        """Return when the device has done what the script gave it: that is no wait for the copy."""

    def finish(self) -> bool:
        """Return when everything is copied; False where the state changed on the way, and the copy is worth nothing."""

    def drop(self) -> None:
        """Copy no more of the snapshot; return when nothing is written any more."""

    def wait_from_now_on(self, reason: str) -> None:
        """Copy at once, for this reason."""


class WaitingCopier:
    """Every copy is made where it is asked for."""

    problem = ""
    is_copying = False

    def admit(self, memory: Bytes) -> None:
        """Nothing to do."""

    def release(self, memory: Bytes) -> None:
        """Nothing to do."""

    def serves(self, source: torch.Tensor) -> bool:
        return source.device.type != "cpu"

    def begin(self, lasting: Lasting) -> None:
        """Nothing to do."""

    def copy(self, target: Bytes, source: torch.Tensor) -> None:
        _copy_now(target, source)

    def seal(self) -> None:
        """Nothing to do."""

    def go_on(self) -> None:
        """Nothing to do."""

    def join(self) -> None:
        """Nothing to do."""

    def finish(self) -> bool:
        return True

    def drop(self) -> None:
        """Nothing to do."""

    def wait_from_now_on(self, reason: str) -> None:
        """It always has."""


class Event(Protocol):
    """A place in a stream, as `torch.cuda.Event`."""

    def query(self) -> bool:
        """Whether the device is past it."""

    def synchronize(self) -> None:
        """Return when it is."""


class Streams(Protocol):
    """A device with the stream that the script's work goes to, and one beside it."""

    def serves(self, source: torch.Tensor) -> bool:
        """Whether this lies on the device."""

    def lock(self, memory: Bytes) -> str:
        """Page-lock memory of this process; why it cannot be, or nothing."""

    def unlock(self, memory: Bytes) -> None:
        """Take that back."""

    def copy(self, pairs: Sequence[Pair]) -> Event:
        """Copy on the stream beside, after what the script's was given so far; the event is past when all is there."""

    def hold(self, event: Event) -> None:
        """What the script's stream is given from now on waits for this on the device."""

    def join(self) -> None:
        """Return when the script's stream has done all that it was given."""


class StreamCopier:
    """See the head of this file.

    Args:
        streams: of the device.
    """

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self._locked: dict[int, int] = {}
        self._lasting: frozenset[int] = frozenset()
        self._early: list[Pair] = []
        self._late: list[Pair] = []
        self._hashes: list[torch.Tensor] = []
        self._under_way: list[Event] = []
        self._has_started = False
        self._is_waiting = False
        self.problem = ""

    @property
    def is_copying(self) -> bool:
        return bool(self._late)

    def admit(self, memory: Bytes) -> None:
        problem = self._streams.lock(memory)
        if problem:
            self.problem = self.problem or f"memory of snapshots cannot be page-locked ({problem})"
        else:
            self._locked[memory.ctypes.data] = memory.nbytes

    def release(self, memory: Bytes) -> None:
        if self._locked.pop(memory.ctypes.data, None) is not None:
            self._streams.unlock(memory)

    def serves(self, source: torch.Tensor) -> bool:
        return self._streams.serves(source)

    def begin(self, lasting: Lasting) -> None:
        self.drop()
        self._lasting = frozenset() if self._is_waiting else lasting()

    def copy(self, target: Bytes, source: torch.Tensor) -> None:
        if not self._is_locked(target):
            _copy_now(target, source)
        elif source.untyped_storage()._cdata in self._lasting:
            self._late.append((target, source))
        else:
            self._early.append((target, source))

    def seal(self) -> None:
        if self._early:
            self._under_way = [self._streams.copy(self._early)]
            self._streams.hold(self._under_way[0])
        if self._late:
            self._hashes = [self._hash()]
        else:
            self.drop()

    def go_on(self) -> None:
        if not self._late or (self._has_started and self._under_way[-1].query()):
            return
        # On the script's stream, and so before whatever it does next.
        self._hashes.append(self._hash())
        self._start()

    def join(self) -> None:
        self._streams.join()

    def finish(self) -> bool:
        if not self._late:
            return True
        self._start()
        self._under_way[-1].synchronize()
        first, *others = [*self._hashes, self._hash()]
        is_same = all(torch.equal(first, other) for other in others)
        self.drop()
        return is_same

    def wait_from_now_on(self, reason: str) -> None:
        self._is_waiting, self.problem = True, reason

    def _is_locked(self, target: Bytes) -> bool:
        begin, size = target.ctypes.data, target.nbytes
        return any(at <= begin and begin + size <= at + length for at, length in self._locked.items())

    def _start(self) -> None:
        if not self._has_started:
            self._has_started = True
            self._under_way.append(self._streams.copy(self._late))

    def _hash(self) -> torch.Tensor:
        """Of the state that is copied late, (n,) int64, on the device."""
        return torch.stack([bit_hash(source) for _, source in self._late])

    def drop(self) -> None:
        for event in self._under_way:
            event.synchronize()
        self._early, self._late, self._hashes, self._under_way = [], [], [], []
        self._has_started = False


class CudaStreams:
    """Implements `Streams`.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def serves(self, source: torch.Tensor) -> bool:
        return source.device.type == "cuda"

    def lock(self, memory: Bytes) -> str:
        code = int(_runtime().cudaHostRegister(memory.ctypes.data, memory.nbytes, 0))
        if not code:
            return ""
        # The runtime keeps the error for whoever asks next, who would raise it as his own: ask now.
        with contextlib.suppress(RuntimeError):
            torch.ones(1, device=self._device)
        return f"cudaHostRegister: {torch.cuda.CudaError(code)}"

    def unlock(self, memory: Bytes) -> None:
        torch.cuda.check_error(int(_runtime().cudaHostUnregister(memory.ctypes.data)))

    def copy(self, pairs: Sequence[Pair]) -> Event:
        self._side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._side):
            for target, source in pairs:
                torch.from_numpy(target).copy_(source, non_blocking=True)
                # The caller keeps the storage alive; should somebody shrink it, its memory must wait for the copy, too.
                source.record_stream(self._side)
            event: torch.cuda.Event = self._side.record_event()
            return event

    def hold(self, event: Event) -> None:
        assert isinstance(event, torch.cuda.Event)
        torch.cuda.current_stream(self._device).wait_event(event)

    def join(self) -> None:
        torch.cuda.current_stream(self._device).synchronize()


def copier_for(device: torch.device) -> Copier:
    """What copies from this device; on the CPU nothing is worth copying late, for it is the training's own cores that
    would copy."""
    return StreamCopier(CudaStreams(device)) if device.type == "cuda" else WaitingCopier()


def _runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _copy_now(target: Bytes, source: torch.Tensor) -> None:
    torch.from_numpy(target).copy_(source)
