"""The steps since the oldest snapshot, as they were fed to the engine: enough to take each of them again.

Bounded in bytes. Where it does not reach back it says why: a step that cannot be run again, an input that the script
has written into since, weights that the script itself wrote between two steps, or no more room. Never here: an engine,
files, decisions.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from resilience.deepspeed.adapter import Position
from resilience.guard.recorder import BackwardEvent, ForwardEvent
from resilience.guard.rng import RngSnapshot
from resilience.guard.values import KeptTensor
from resilience.kernels.hashing import bit_hash

__all__ = ["Groups", "History", "StepRecord", "same_groups"]

Groups = list[dict[str, Any]]
"""What an optimizer's groups say besides their parameters."""

_RNG_BYTES = 32 << 10
"""Of the generators' states at one moment, at most: Python's own is a tuple of 625 numbers."""


@dataclasses.dataclass(slots=True, kw_only=True)
class StepRecord:
    """One optimizer step as it was taken."""

    step: int
    events: list[ForwardEvent | BackwardEvent]
    position: Position
    """Of the engine at the boundary, just before the optimizer."""
    rng: RngSnapshot
    """At the boundary."""
    lr_kwargs: Any
    loss_scale: float
    """That is in the recorded cotangents."""
    script_groups: Groups | None
    """The optimizer's groups at the boundary, where the script has written them since the step before."""
    seals: list[tuple[KeptTensor, torch.Tensor]]
    """Inputs that are kept by reference, with the hash of what they held; int64 scalars on their devices."""
    num_bytes: int

    def spoiled(self) -> bool:
        """Whether an input no longer holds what it held. Waits for the device."""
        return any(not kept.is_unchanged() or bool(bit_hash(kept.tensor) != seal) for kept, seal in self.seals)


class History:
    """The record of the last steps.

    Args:
        max_bytes: of all records together.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._records: collections.deque[StepRecord] = collections.deque()
        self._num_bytes = 0
        self._floor: int | None = None
        self._why = "no memory snapshot was taken yet"
        self._groups: Groups | None = None

    @property
    def is_recording(self) -> bool:
        """Whether there is a snapshot to go back to, so that steps are worth keeping."""
        return self._floor is not None

    @property
    def num_bytes(self) -> int:
        """Of all records, as far as they are counted: inputs, buffers, cotangents, states of generators."""
        return self._num_bytes

    def begin(self, step: int, groups: Groups) -> None:
        """The first snapshot is about to be taken, at the end of `step`; later calls change nothing.

        Args:
            step: just taken.
            groups: of the optimizer, now.
        """
        if self._floor is None:
            self._floor, self._why = step, f"no memory snapshot is older than step {step}"
            self._groups = groups

    def add(
        self,
        step: int,
        events: Sequence[ForwardEvent | BackwardEvent],
        *,
        position: Position,
        rng: RngSnapshot,
        lr_kwargs: Any,
        loss_scale: float,
        before: Groups,
        after: Groups,
        problem: str = "",
    ) -> bool:
        """Keep a step that has just been taken.

        Args:
            step: its number.
            events: as the recorder holds them; they are this history's own from now on.
            position: of the engine at the step's boundary.
            rng: at the boundary.
            lr_kwargs: as given to `engine.step`.
            loss_scale: that is in the recorded cotangents.
            before: the optimizer's groups at the boundary.
            after: and now.
            problem: why the step cannot be run again; empty where it can.

        Returns:
            Whether the script writes into tensors that it has passed: inputs should be copied from now on.
        """
        assert self._floor is not None, "nothing to go back to"
        script_groups = None if self._groups is not None and same_groups(self._groups, before) else before
        self._groups = after
        reused = self._forget_reused()
        problem = problem or _outside(events)
        if problem:
            self.cut(step, f"step {step} cannot be run again: {problem}")
            return reused
        seals = _let_go(events)
        record = StepRecord(
            step=step,
            events=list(events),
            position=position,
            rng=rng,
            lr_kwargs=lr_kwargs,
            loss_scale=loss_scale,
            script_groups=script_groups,
            seals=seals,
            num_bytes=_bytes_of(events),
        )
        self._records.append(record)
        self._num_bytes += record.num_bytes
        while self._num_bytes > self._max_bytes and self._records:
            oldest = self._records[0].step
            mib = self._max_bytes / (1 << 20)
            self.cut(oldest, f"step {oldest} was dropped to stay within {mib:g} MiB (snapshot.history_max_mib)")
        return reused

    def cut(self, step: int, why: str) -> None:
        """Nothing before the end of `step` can be gone back to, for this reason."""
        if self._floor is None or step <= self._floor:
            return
        self._floor, self._why = step, why
        self.trim(step)

    def trim(self, oldest: int) -> None:
        """There is no snapshot before `oldest` any more: forget what led up to it."""
        while self._records and self._records[0].step <= oldest:
            self._num_bytes -= self._records.popleft().num_bytes

    def problem(self, step: int) -> str:
        """Why the steps after a snapshot of `step` cannot be taken again, in words; empty where they can."""
        if self._floor is None or step < self._floor:
            return self._why
        return ""

    def since(self, step: int) -> list[StepRecord]:
        """The records of the steps after `step`, in order."""
        return [record for record in self._records if record.step > step]

    def has_written_groups(self, now: Groups) -> bool:
        """Whether the script has written the optimizer's groups since the newest step."""
        return self._groups is None or not same_groups(self._groups, now)

    def _forget_reused(self) -> bool:
        """Cut off what can no longer be run again, because its inputs hold something else by now."""
        reused = [r.step for r in self._records if not all(kept.is_unchanged() for kept, _ in r.seals)]
        for step in reused:
            self.cut(step, f"the script has written into an input of step {step} since")
        return bool(reused)


def same_groups(first: Groups, second: Groups) -> bool:
    """Whether two copies of an optimizer's groups say the same."""
    return len(first) == len(second) and all(
        a.keys() == b.keys() and all(_same(a[name], b[name]) for name in a) for a, b in zip(first, second, strict=True)
    )


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        both = isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)
        return both and a.dtype == b.dtype and torch.equal(a, b)
    return type(a) is type(b) and bool(a == b)


def _outside(events: Sequence[ForwardEvent | BackwardEvent]) -> str:
    """Why recorded cotangents say nothing where the weights are others than they were."""
    backwards = (event for event in events if isinstance(event, BackwardEvent))
    if any(mark is not None for event in backwards for _, _, _, mark in event.cotangents):
        return "its loss is computed outside of the engine"
    return ""


def _let_go(events: Sequence[ForwardEvent | BackwardEvent]) -> list[tuple[KeptTensor, torch.Tensor]]:
    """Drop what only the step itself needed, share what did not change; what is kept by reference, with its hash."""
    seals = []
    last: RngSnapshot | None = None
    for event in events:
        event.rng = last = _shared(event.rng, last)
        if isinstance(event, ForwardEvent):
            event.expect_no_more()
            kept = [each for each in _kept((event.args, event.kwargs)) if each.version is not None]
        else:
            kept = [each for _, _, each, _ in event.cotangents if each.version is not None]
        seals += [(each, bit_hash(each.tensor)) for each in kept]
    return seals


def _shared(rng: RngSnapshot, last: RngSnapshot | None) -> RngSnapshot:
    """`rng`, its parts being those of `last` where they are equal: most steps draw from one generator or none."""
    if last is None:
        return rng
    same_numpy = rng.numpy[2:] == last.numpy[2:] and np.array_equal(rng.numpy[1], last.numpy[1])
    return dataclasses.replace(
        rng,
        cpu=last.cpu if torch.equal(rng.cpu, last.cpu) else rng.cpu,
        numpy=last.numpy if same_numpy else rng.numpy,
        python=last.python if rng.python == last.python else rng.python,
    )


def _kept(value: Any) -> Iterator[KeptTensor]:
    if isinstance(value, KeptTensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _kept(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _kept(item)


def _bytes_of(events: Sequence[ForwardEvent | BackwardEvent]) -> int:
    total = 0
    for event in events:
        total += _RNG_BYTES
        if isinstance(event, ForwardEvent):
            total += sum(each.tensor.nbytes for each in _kept((event.args, event.kwargs)))
            total += sum(buffer.nbytes for buffer in event.buffers.values())
        else:
            total += sum(each.tensor.nbytes for _, _, each, _ in event.cotangents)
    return total
