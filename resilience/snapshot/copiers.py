"""Brings the bytes of storages on a device into the mapped files of a slot: at once, or beside the training.

`StreamCopier` copies on a stream of its own into page-locked memory. What a forward may change is copied first, and the
device goes on with the script's work only when it has been; what only an optimizer step changes is copied from the next
forward on, and waited for before the step. That nothing changed it meanwhile is checked: hashes of its bits, taken on
the device with the snapshot, when the copy begins and where it has ended, must agree. Never here: files, commits.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from resilience.kernels.hashing import bit_hash

__all__ = ["Bytes", "Copier", "CudaStreams", "Event", "StreamCopier", "Streams", "WaitingCopier", "copier_for"]

Bytes = np.ndarray[Any, np.dtype[np.uint8]]

_Pair = tuple[Bytes, torch.Tensor]
"""(target in mapped memory, source on the device), both (n,) uint8."""

Lasting = Callable[[], frozenset[int]]
"""Gives the storages, by identity, that nothing but an optimizer step or the script changes."""


class Copier(Protocol):
    """Copies the storages of one snapshot after the other: `begin`, `copy` for each, `seal`; then `go_on` at each
    forward while it `is_copying`, and `finish`."""

    problem: str
    """Why all copies are waited for although they need not be; empty where that is not so."""
    waited_s: float
    """How long the device stood still in the last `finish`."""

    @property
    def is_copying(self) -> bool:
        """Whether something of the snapshot is still to be copied, as far as `finish` has told."""

    @property
    def is_done(self) -> bool:
        """Whether `finish` need not wait."""

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
    is_done = True
    waited_s = 0.0

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

    def elapsed_time(self, end_event: Any) -> float:
        """Milliseconds from here to there, both past; negative where that came first."""


class Streams(Protocol):
    """A device with the stream that the script's work goes to, and one beside it."""

    def serves(self, source: torch.Tensor) -> bool:
        """Whether this lies on the device."""

    def lock(self, memory: Bytes) -> str:
        """Page-lock memory of this process; why it cannot be, or nothing."""

    def unlock(self, memory: Bytes) -> None:
        """Take that back."""

    def flag(self) -> torch.Tensor:
        """A bool scalar in memory, False, that the device may write without being waited for."""

    def beside(self, work: Callable[[], None]) -> Event:
        """Give this to the stream beside, after what the script's was given so far; the event is past where it ends."""

    def mark(self) -> Event:
        """Past when the script's stream has done all that it was given so far."""

    def hold(self, event: Event) -> None:
        """What the script's stream is given from now on waits for this on the device."""


class StreamCopier:
    """See the head of this file.

    Args:
        streams: of the device.
    """

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self._locked: dict[int, int] = {}
        self._lasting: frozenset[int] = frozenset()
        self._early: list[_Pair] = []
        self._late: list[_Pair] = []
        self._hashes: list[torch.Tensor] = []
        self._verdicts: list[torch.Tensor] = []
        self._under_way: list[Event] = []
        self._is_waiting = False
        self.problem = ""
        self.waited_s = 0.0

    @property
    def is_copying(self) -> bool:
        return bool(self._late)

    @property
    def is_done(self) -> bool:
        return not self._late or (self._has_started and self._under_way[-1].query())

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
            self._under_way = [self._streams.beside(functools.partial(_copy_all, self._early))]
            self._streams.hold(self._under_way[0])
        if self._late:
            self._hashes = [self._hash()]
        else:
            self.drop()

    def go_on(self) -> None:
        if self.is_done:
            return
        # On the script's stream, and so before whatever it does next.
        self._hashes.append(self._hash())
        if self._has_started:
            self._verdicts.append(self._streams.flag())
            work = functools.partial(self._judge, self._hashes[-1], self._verdicts[-1])
            self._under_way.append(self._streams.beside(work))
        else:
            self._start()

    def finish(self) -> bool:
        if not self._late:
            return True
        mark = self._streams.mark()
        if not self._has_started:
            self._hashes.append(self._hash())
            self._start()
        copied = self._under_way[-1]
        copied.synchronize()
        # While the device has work of the script's left, nobody waits for the copy.
        self.waited_s = max(0.0, mark.elapsed_time(copied) / 1e3) if mark.query() else 0.0
        is_same = all(map(bool, self._verdicts))
        self.drop()
        return is_same

    def drop(self) -> None:
        for event in self._under_way:
            event.synchronize()
        self._early, self._late, self._hashes, self._verdicts, self._under_way = [], [], [], [], []

    def wait_from_now_on(self, reason: str) -> None:
        self._is_waiting, self.problem = True, reason

    def _is_locked(self, target: Bytes) -> bool:
        begin, size = target.ctypes.data, target.nbytes
        return any(at <= begin and begin + size <= at + length for at, length in self._locked.items())

    @property
    def _has_started(self) -> bool:
        return bool(self._verdicts)

    def _start(self) -> None:
        late, then = self._late, self._hashes[-1]
        self._verdicts = [self._streams.flag(), self._streams.flag()]
        at_start, at_end = self._verdicts

        def work() -> None:
            self._judge(then, at_start)
            _copy_all(late)
            self._judge(_hash(late), at_end)

        self._under_way.append(self._streams.beside(work))

    def _hash(self) -> torch.Tensor:
        return _hash(self._late)

    def _judge(self, found: torch.Tensor, verdict: torch.Tensor) -> None:
        """Say on the device whether these hashes are those of the snapshot."""
        verdict.copy_((found == self._hashes[0]).all(), non_blocking=True)


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
        torch.cuda.check_error(_runtime().cudaHostUnregister(memory.ctypes.data))

    def flag(self) -> torch.Tensor:
        return torch.zeros((), dtype=torch.bool, pin_memory=True)

    def beside(self, work: Callable[[], None]) -> Event:
        self._side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._side):
            work()
            return self.mark()

    def mark(self) -> Event:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def hold(self, event: Event) -> None:
        assert isinstance(event, torch.cuda.Event)
        torch.cuda.current_stream(self._device).wait_event(event)


def copier_for(device: torch.device) -> Copier:
    """What copies from this device; on the CPU nothing is worth copying late, for it is the training's own cores that
    would copy."""
    return StreamCopier(CudaStreams(device)) if device.type == "cuda" else WaitingCopier()


def _runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _copy_all(pairs: Sequence[_Pair]) -> None:
    """Copy on the current stream, into memory that is page-locked."""
    for target, source in pairs:
        torch.from_numpy(target).copy_(source, non_blocking=True)
        if source.is_cuda:
            # The caller keeps the storage alive; should somebody shrink it, its memory must wait for the copy, too.
            source.record_stream(torch.cuda.current_stream(source.device))


def _hash(pairs: Sequence[_Pair]) -> torch.Tensor:
    """Of the sources, (n,) int64, on the device."""
    return torch.stack([bit_hash(source) for _, source in pairs])


def _copy_now(target: Bytes, source: torch.Tensor) -> None:
    torch.from_numpy(target).copy_(source)
