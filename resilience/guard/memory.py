"""What the step transaction asks of the memory tier: the seam behind which snapshots and fast-forwarding live.

Never here: files, arenas, state of an engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch

from resilience.guard.recorder import ForwardEvent

__all__ = ["FastForwarding", "NoSnapshots", "Past", "Snapshots", "Trail"]


class Snapshots(Protocol):
    """Copies of this rank's state. All ranks call `take` for the same steps, because the boundary agreed on them."""

    lost_step: int
    """Step of the last snapshot, where this rank's copy of it came to nothing; else 0."""
    problem: str
    """Why this rank takes none any more; empty while it does."""
    blocked_s: float
    """Seconds that training waited for copies, in all."""

    @property
    def interval_steps(self) -> int:
        """Steps between two of them, as things stand."""

    @property
    def can_take(self) -> bool:
        """Whether a slot is free: none is while a guardian still needs what they hold."""

    def wants(self, step: int) -> bool:
        """Whether it is time for a snapshot after `step`, by this rank's own measure."""

    def take(self, step: int, *, clean_through: int) -> None:
        """Copy the state as it is at the end of `engine.step()`, or begin to. Collective."""

    def before_forward(self) -> None:
        """A forward begins: until `finish` nothing changes weights, masters and moments. Waits for nothing."""

    def finish(self) -> None:
        """Return when the snapshot that was begun, if any, is whole. Called before anything that changes the state, or
        that may need the snapshot; not collective."""

    def give_up(self, step: int) -> None:
        """Some rank's copy of the snapshot of this step came to nothing."""


class NoSnapshots:
    """Where none are taken."""

    lost_step = 0
    problem = "memory snapshots are off"
    blocked_s = 0.0
    interval_steps = 0
    can_take = False

    def wants(self, step: int) -> bool:
        return False

    def take(self, step: int, *, clean_through: int) -> None:
        raise AssertionError("no slot was ever free")

    def before_forward(self) -> None:
        """Nothing is copied."""

    def finish(self) -> None:
        """Nothing was begun."""

    def give_up(self, step: int) -> None:
        """There is none."""


class Past(Protocol):
    """The snapshots that this rank can go back to without leaving its process."""

    def steps(self) -> list[int]:
        """Of the snapshots of this generation that are whole here and hashed, ascending."""

    def settled_steps(self) -> list[int]:
        """The same, after waiting a moment for those that are still being hashed."""

    def prepare(self, step: int) -> None:
        """Verify all files of a snapshot and bring them together. Changes nothing in the engine.

        Raises:
            SnapshotError: one line that says what is missing, or differs.
        """

    def load(self, step: int) -> Mapping[str, int]:
        """Load what was prepared into the live engine, and hold what is in it against the manifest. Collective.

        Returns:
            The engine's counters, as the snapshot has them.

        Raises:
            SnapshotError: it could not be loaded, or is not what the manifest says; the engine is not to be used.
        """

    def drop_after(self, step: int) -> None:
        """Give up this rank's snapshots of later steps: nobody loads them any more."""


class Trail(Protocol):
    """What a rank leaves for its successor: enough to lead the same script past the steps that a snapshot holds."""

    def before_forward(self, args: Any, kwargs: Any) -> Any:
        """A forward of the engine begins; what this returns goes to `after_forward`."""

    def after_forward(self, began: Any, micro_step: int, event: ForwardEvent | None, outputs: Any) -> None:
        """It has run; `event` is None for one without gradients (evaluation)."""

    def forward_replayed(self, event: ForwardEvent, outputs: list[torch.Tensor]) -> None:
        """A training forward was run again; these are its differentiable outputs now."""

    def step_taken(self, step: int, *, deterministic: bool | None) -> None:
        """`engine.step()` is about to return after the optimizer step `step`."""


class FastForwarding(Protocol):
    """Leads a restarted script to the step of its snapshot, in the place of the engine."""

    def attach(self, host: Any) -> None:
        """Called once by the guard, with itself."""

    @property
    def active(self) -> bool:
        """Whether the script is still behind the snapshot; False for good once it has caught up. The first question
        comes before the first forward, and is collective."""

    def forward(self, args: Any, kwargs: Any) -> Any:
        """What the recorded forward returned."""

    def backward(self, loss: Any, args: Any, kwargs: Any) -> Any:
        """Nothing but what `engine.backward` returns."""

    def step(self, args: Any, kwargs: Any) -> Any:
        """Advance counters and scheduler; at the snapshot's step install its state."""
