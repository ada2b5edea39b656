"""What the guard says and hears, without the network: the seam between the step transaction and the client."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

from resilience.events import CheckpointFact, Decision, Detection, Evidence, OrderAnswer, SnapshotFact, Strike

__all__ = ["NO_ORDERS", "Fact", "Orders", "Reporter", "SilentReporter"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Orders:
    """What this rank was told to do, as it stands at a boundary. Numbers, so that ranks can take the largest."""

    stop_code: int = 0
    """Exit code of an order to stop; 0 for none."""
    restart: bool = False
    """Leave, a new generation begins."""
    fenced: bool = False
    """A newer generation has begun already: neither step nor publish."""
    drain: bool = False
    """Leave with 75 after the next checkpoint."""
    rewind: int = 0
    """1 + the step of the snapshot that an operator wants to go back to; 1 for the newest clean one, 0 for no order."""
    snapshot: str = ""
    """Id of an operator's order to take a memory snapshot at the end of the step; empty for none."""
    reason: str = ""
    inherited_skips: int = 0
    """Steps skipped in a row that an earlier generation ended with."""
    deterministic: bool = False
    """An earlier generation measured that replays are bit-equal."""


NO_ORDERS = Orders()

Fact = Detection | Strike | Decision | CheckpointFact | SnapshotFact | OrderAnswer
"""What a rank tells the coordinator of."""


class Reporter(Protocol):
    """`resilience.guard.line.LineToCoordinator`, or `SilentReporter`. No method but `decide` and `leave` waits."""

    def orders(self) -> Orders: ...

    def order_done(self, name: str) -> None: ...

    def report(self, fact: Fact, /) -> None: ...

    def note(self, kind: str, message: str, *, step: int = 0) -> None: ...

    def heartbeat(self, *, step_seconds: float | None = None, **fields: Any) -> None: ...

    def add_badput(self, cause: str, seconds: float) -> None: ...

    def add_skipped_step(self) -> None: ...

    def set_deterministic(self, deterministic: bool) -> None: ...

    def decide(self, evidence: Evidence, deadline_s: float) -> Decision | None: ...

    def conclude(self, decision: Decision) -> None: ...

    def leave(self, exit_code: int, reason: str) -> None: ...


class SilentReporter:
    """For a run without a coordinator: nobody is asked, nobody answers; every decision is the rank's own.

    Args:
        on_decision: called with each concluded decision.
        on_fact: called with each fact.
    """

    def __init__(
        self,
        *,
        on_decision: Callable[[Decision], None] | None = None,
        on_fact: Callable[[Fact], None] | None = None,
    ) -> None:
        self._on_decision = on_decision
        self._on_fact = on_fact

    def orders(self) -> Orders:
        return NO_ORDERS

    def order_done(self, name: str) -> None:
        """There are none."""

    def report(self, fact: Fact, /) -> None:
        if self._on_fact is not None:
            self._on_fact(fact)

    def note(self, kind: str, message: str, *, step: int = 0) -> None:
        """Nobody listens."""

    def heartbeat(self, *, step_seconds: float | None = None, **fields: Any) -> None:
        """Nobody listens."""

    def add_badput(self, cause: str, seconds: float) -> None:
        """Nobody listens."""

    def add_skipped_step(self) -> None:
        """Nobody listens."""

    def set_deterministic(self, deterministic: bool) -> None:
        """Nobody listens."""

    def decide(self, evidence: Evidence, deadline_s: float) -> Decision | None:
        return None

    def conclude(self, decision: Decision) -> None:
        if self._on_decision is not None:
            self._on_decision(decision)

    def leave(self, exit_code: int, reason: str) -> None:
        """Nobody listens."""
