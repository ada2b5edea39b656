"""What saving and loading of verified checkpoints both need to know of the engine and of the run."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any, NoReturn, Protocol

import torch

from resilience.checkpoint.doubt import SavedCheckpoints
from resilience.clock import Clock
from resilience.events import CheckpointFact, CheckpointKind

__all__ = ["GuardState", "Led", "Reporter", "Setting", "Share"]

_log = logging.getLogger(__name__)


class Reporter(Protocol):
    """Where facts go."""

    def report(self, fact: CheckpointFact, /) -> None:
        """Pass a fact on; never blocks."""

    def note(self, kind: str, message: str, *, step: int = 0) -> None:
        """Pass on something that a person should read; never blocks."""


class GuardState(Protocol):
    """What the guard knows, and must be told."""

    @property
    def generation(self) -> int:
        """The generation of this process."""

    @property
    def last_verified_step(self) -> int:
        """Newest step whose checks have all reported."""

    loaded_step: int | None
    """Set here to the step of the checkpoint that was loaded."""

    @property
    def saved(self) -> SavedCheckpoints:
        """Told here of each checkpoint that this rank's storage has got."""


class Led(Protocol):
    """A script that may be led to a memory snapshot, whose state replaces what it loads."""

    relies_on_snapshot: bool
    """Set here: whether something of the engine's state was left out, which only the snapshot brings."""

    def goes_beyond(self, step: int) -> bool:
        """Whether this rank's script will be led past the end of `step`, as far as it knows."""

    def begin_again(self, reason: str) -> NoReturn:
        """What was left out is needed after all: end this process; the next generation loads everything. On all ranks
        alike."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """Which part of the hashing is this rank's: the ranks that see the same storage divide its files among them."""

    index: int
    count: int
    node: str | None
    """Set where each node has storage of its own (DeepSpeed's use_node_local_storage)."""

    @property
    def leads(self) -> bool:
        """Whether this rank writes the manifest and `latest` on its storage."""
        return self.index == 0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One engine in one run."""

    engine: Any
    run_id: str
    enforce: bool
    """False in shadow mode: what cannot be trusted is said, and loaded all the same."""
    client: Reporter
    guard_state: GuardState
    clock: Clock
    started_at: float
    """When this process began, by its own clock, in seconds since the Unix epoch."""
    rank: int
    world_size: int
    share: Share
    led: Led | None = None
    """None where nothing leads the script."""

    @property
    def device(self) -> torch.device:
        """Where the ranks can exchange tensors."""
        return torch.device(self.engine.device)

    def report(self, kind: CheckpointKind, directory: str, tag: str, step: int, **fields: Any) -> None:
        """Pass a fact to the coordinator, once for the job."""
        if self.rank != 0:
            return
        at = self.clock.wall()
        self.client.report(CheckpointFact(kind=kind, directory=directory, tag=tag, step=step, at=at, **fields))

    def note(self, kind: str, message: str) -> None:
        """Say something to the person and to the coordinator, once for the job."""
        if self.rank != 0:
            return
        _log.warning("resilience: %s", message)
        self.client.note(kind, message, step=int(self.engine.global_steps))
