"""What this rank keeps between two steps is hashed after the one and again before it is used: only hardware can have
changed it in between, or the script.

Weights are compared before the first forward of the next step and again, with masters and moments, before its
optimizer step. A script that writes them moves a version counter or a pointer, or goes through one of DeepSpeed's own
ways to do so (`shards.watch_edits`): no alarm then. What is done about a difference is in `at_rest_settle.py`. Never
here: anything that waits for another rank.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import torch

from resilience.clock import Clock, SystemClock
from resilience.deepspeed.shards import Held, Role
from resilience.errors import FaultPlanError
from resilience.faults.plan import STATE_SITES
from resilience.faults.tensor import TensorInjector
from resilience.guard.at_rest_schedule import period, pieces
from resilience.kernels.hashing import WORD_BYTES, bit_hash

__all__ = ["AtRest", "Mark", "integers", "site_of"]

_NO_LAYER = -2
"""A place that no fault of a plan can name."""


def site_of(role: Role) -> str:
    """The site of the fault plan, and of detections, that a tensor belongs to."""
    return "weight" if role is Role.WEIGHT else "optimizer"


@dataclasses.dataclass(slots=True, eq=False)
class Mark:
    """What a piece of a tensor was when the step had been taken."""

    held: Held
    start: int
    """First element of the piece within what is held."""
    stop: int
    hash: torch.Tensor | int | None
    """On a device until it is compared; None where it is only known that not all ranks have the same."""
    versions: tuple[int, ...]
    of_replicas: bool = False
    """Whether it was found by comparing ranks."""
    is_suspected: bool = False
    """Whether it is here because of another one: nothing but its master can tell whether it is wrong."""
    clean_step: int | None = None
    """Newest step whose snapshot cannot hold a change that is found now: it was taken before the piece was last seen to
    be what it was. None where that was never."""

    def elements(self) -> torch.Tensor:
        """The piece as it is now, (stop − start,), under a version counter of its own."""
        return self.held.read().data[self.start : self.stop]

    def hash_now(self) -> torch.Tensor:
        """Hash of the piece as it is now; int64 scalar on its device."""
        return _hash(self.held, self.start, self.stop)

    @property
    def is_explained(self) -> bool:
        """Whether somebody wrote to the tensor, or replaced it, in a way that shows."""
        return _was_edited(self.held, self.versions)


class AtRest:
    """Hashes of one rank's state.

    Args:
        holdings: what there is now (`shards.holdings`).
        share: `DetectionConfig.at_rest_share`.
        injector: strikes the sites `weight` and `optimizer`, after the hashes were taken.
        clock: for the time of a difference.
    """

    def __init__(
        self,
        holdings: Callable[[], list[Held]],
        *,
        share: float,
        injector: TensorInjector | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.holdings = holdings
        self._share = share
        self._turns = period(share)
        self._injector = injector
        self._clock = clock or SystemClock()
        self._marks: list[Mark] = []
        self._still: dict[tuple[str, int, int], Mark] = {}
        self._step = 0
        self._agreed: dict[int, int] = {}
        self._is_forgotten = False
        self._versions: list[tuple[Held, tuple[int, ...]]] | None = None
        self.on_forget: Callable[[], None] = lambda: None
        """Called where tensors may lie elsewhere from now on."""
        self.watches_edits = False
        """Whether edits are to be seen that touch nothing of the slice whose turn it is."""
        self._num_checks: Counter[str] = Counter()
        self.differences: list[Mark] = []
        """Pieces that are not what they were, to be settled with the other ranks."""
        self.detected_at = 0.0
        """When the newest of them was seen, in seconds since the Unix epoch."""
        self.was_edited = False
        """Whether the script wrote to any of it since the last step, as far as that shows."""
        self.has_begun = False
        """Whether a step has been hashed."""

    def checks(self) -> dict[str, int]:
        """How many pieces were compared since the start, by site."""
        return dict(self._num_checks)

    def after_step(self, step: int) -> None:
        """Hash this step's slice, then let the faults of the plan strike. `step` has just been taken."""
        held = self.holdings()
        self.differences.clear()
        self.was_edited = self._is_forgotten = False
        self.has_begun = True
        self._step = step
        self._marks = []
        self._versions = [(item, item.versions()) for item in held] if self.watches_edits else None
        for roles in ((Role.WEIGHT,), (Role.MASTER, Role.MOMENT)):
            self._mark([item for item in held if item.role in roles], step)
        if self._injector is not None:
            self._strike(self._injector, held, step)

    def look(self, roles: Iterable[Role] = tuple(Role)) -> int:
        """Compare the pieces of these roles with what they were; returns how many differences wait to be settled."""
        self._look_for_edits()
        among = frozenset(roles)
        wanted = [mark for mark in self._marks if mark.held.role in among]
        explained = [mark for mark in wanted if mark.is_explained]
        if explained:
            self.was_edited = True
            self.drop(explained)
        marks = [mark for mark in wanted if mark not in explained]
        self._num_checks.update(site_of(mark.held.role) for mark in marks)
        now = integers([mark.hash_now() for mark in marks])
        then = integers([mark.hash for mark in marks if mark.hash is not None])
        found = [mark for mark, a, b in zip(marks, now, then, strict=True) if a != b]
        for mark in marks:
            if mark not in found:
                mark.clean_step = self._step
        if found:
            self.add_differences(found)
        elif among == frozenset(Role) and not self._is_forgotten and self._turns:
            self._agreed[self._step % self._turns] = self._step
        return len(self.differences)

    @property
    def agreed_through(self) -> int | None:
        """Newest step since which every piece has had its turn and agreed; 0 while some has not. None: none ever has.

        What changed in the state of a later step may not have been looked at yet.
        """
        if not self._turns:
            return None
        return min(self._agreed.values()) if len(self._agreed) == self._turns else 0

    @property
    def sees_all(self) -> bool:
        """Whether each step's slice is all there is."""
        return self._turns == 1

    def suspect(self) -> None:
        """Something was hit: leave all weights that a step writes to be held against their masters, and frozen ones if
        they are not what they were."""
        frozen = [mark for mark in self._still.values() if not mark.is_explained]
        now, then = integers([m.hash_now() for m in frozen]), integers([m.hash for m in frozen if m.hash is not None])
        found = [mark for mark, a, b in zip(frozen, now, then, strict=True) if a != b]
        held = [item for item in self.holdings() if item.role is Role.WEIGHT and not item.is_frozen]
        for place, start, stop in pieces([item.length * item.width for item in held], 1.0, self._step):
            item = held[place]
            first, last = start // item.width, stop // item.width
            mark = Mark(item, first, last, None, item.versions(), of_replicas=True, is_suspected=True)
            mark.clean_step = self._step - 1
            found.append(mark)
        self.add_differences(found)

    def moved(self) -> None:
        """This package has moved tensors since the step without changing a bit: no edit, and compared all the same."""
        for mark in self._marks:
            mark.versions = mark.held.versions()
        if self._versions is not None:
            self._versions = [(item, item.versions()) for item, _ in self._versions]

    def rewound(self, step: int) -> None:
        """All state was replaced by that of the end of `step`."""
        self.forget()
        self.was_edited = False
        self._agreed = {turn: min(agreed, step) for turn, agreed in self._agreed.items()}

    def now(self) -> float:
        """Seconds since the Unix epoch."""
        return self._clock.wall()

    def milliseconds_since_detection(self) -> float:
        """Since the newest difference was seen."""
        return max(0.0, self._clock.wall() - self.detected_at) * 1e3

    def add_differences(self, marks: Sequence[Mark]) -> None:
        """Leave these to be settled; each one once."""
        self.detected_at = self._clock.wall()
        self.differences += [mark for mark in marks if mark not in self.differences]

    def drop(self, marks: Sequence[Mark]) -> None:
        """These are compared no more until the next step."""
        gone = {id(mark) for mark in marks}
        self._marks = [mark for mark in self._marks if id(mark) not in gone]
        self.differences = [mark for mark in self.differences if id(mark) not in gone]
        self._still = {key: mark for key, mark in self._still.items() if id(mark) not in gone}

    def forget(self) -> None:
        """The script has written weights or optimizer state through DeepSpeed: nothing is known of them any more."""
        self.was_edited = self._is_forgotten = True
        self._marks.clear()
        self._still.clear()
        self.differences.clear()
        self._versions = None
        self.on_forget()

    def is_unchanged(self, name: str) -> bool | None:
        """Whether the tensor of this name was just found to be what it was; None where it was not compared."""
        if any(mark.held.name == name for mark in self.differences):
            return False
        return True if any(mark.held.name == name for mark in self._marks) else None

    def _mark(self, held: Sequence[Held], step: int) -> None:
        for place, start, stop in pieces([item.length * item.width for item in held], self._share, step):
            item = held[place]
            key = (item.name, start, stop)
            mark = self._still.get(key)
            if mark is None or mark.is_explained:
                first, last = start // item.width, stop // item.width
                mark = Mark(item, first, last, _hash(item, first, last), item.versions(), clean_step=step - 1)
            if item.is_frozen:
                # No step changes it: it is held against what it was when it was first seen.
                self._still[key] = mark
            self._marks.append(mark)

    def _look_for_edits(self) -> None:
        if self._versions is not None and any(_was_edited(item, versions) for item, versions in self._versions):
            self.was_edited = True
            self._versions = None

    def _strike(self, injector: TensorInjector, held: Sequence[Held], step: int) -> None:
        injector.begin(step, 0, 0)
        if not injector.armed:
            return
        seen: set[tuple[str, int]] = set()
        for item in held:
            site, elements = site_of(item.role), item.read().data
            if (site, item.index) not in seen:
                # The parameter's name alone means the copy that is computed with, or the master.
                seen.add((site, item.index))
                injector.strike(site, item.index, elements, 0, param=item.parameter)
            if item.name != item.parameter:
                injector.strike(site, _NO_LAYER, elements, 0, param=item.name)
        missed = injector.never_struck(STATE_SITES)
        if missed:
            address = missed[0].param or f"layer {missed[0].layer}"
            raise FaultPlanError(f"site {missed[0].site!r}: rank {missed[0].rank} keeps nothing of {address!r}")


def _was_edited(held: Held, versions: tuple[int, ...]) -> bool:
    """Whether somebody wrote to a tensor, or replaced it, since its versions were these."""
    try:
        return versions != held.versions()
    except (AttributeError, IndexError, KeyError, RuntimeError):
        # It is not where it was, or not in one piece: replaced from outside.
        return True


def _hash(held: Held, start: int, stop: int) -> torch.Tensor:
    return bit_hash(held.read()[start:stop], offset=start * held.width // WORD_BYTES)


def integers(scalars: Sequence[torch.Tensor | int]) -> list[int]:
    """The values of int64 scalars (or numbers), read from each device at once."""
    tensors = [scalar for scalar in scalars if isinstance(scalar, torch.Tensor)]
    values: dict[int, int] = {}
    for device in {tensor.device for tensor in tensors}:
        here = [tensor for tensor in tensors if tensor.device == device]
        values.update(zip(map(id, here), torch.stack(here).tolist(), strict=True))
    return [values[id(scalar)] if isinstance(scalar, torch.Tensor) else scalar for scalar in scalars]
