"""An operator's order for a memory snapshot: when it is due, and what he is answered, on rank 0.

He is answered once, and soon: that all ranks have it, at the boundary after it; that none is taken any more, at once;
that no slot is free, when that has been so for a while. Never here: copies, what the ranks compare.
"""

from __future__ import annotations

from resilience.clock import Clock
from resilience.events import OrderAnswer
from resilience.guard.notes import Flags
from resilience.guard.reporter import Reporter

__all__ = ["SnapshotOrder"]

_PATIENCE_S = 20.0
"""How long an order waits for a free slot: guardians need what the slots hold for seconds."""


class SnapshotOrder:
    """Follows one order after the other.

    Args:
        reporter: the line to the coordinator.
        clock: for patience.
    """

    def __init__(self, reporter: Reporter, clock: Clock) -> None:
        self._reporter = reporter
        self._clock = clock
        self._waiting = ""
        self._waits_since = 0.0
        self._due = ""
        self._due_after = 0

    def at_boundary(self, flags: Flags, *, step: int, problem: str) -> None:
        """See to the order, if there is one.

        Args:
            flags: what all ranks know.
            step: being settled; a snapshot that is due is taken after it.
            problem: why this rank takes none any more; empty while it does.
        """
        why_off = (problem or "another rank takes none: `resilience events` says why") if flags.snapshots_off else ""
        if self._due:
            self._tell_of_the_due_one(flags, why_off)
        order = self._reporter.orders().snapshot
        if not order:
            return
        if why_off:
            self._answer(order, problem=why_off)
        elif not flags.no_snapshot and flags.snapshot:
            self._due, self._due_after = order, step
        elif self._has_waited(order):
            self._answer(
                order,
                problem=f"for {_PATIENCE_S:.0f} s some rank had no free slot, because guardians need what they hold or "
                "the run goes back to one; ask again, or set more snapshot.slots",
            )
        else:
            return
        self._reporter.order_done("take_snapshot")

    def _tell_of_the_due_one(self, flags: Flags, why_off: str) -> None:
        problem = why_off
        if flags.lost_snapshot == self._due_after:
            problem = "the state was changed while a rank copied it; ask again"
        self._answer(self._due, step=0 if problem else self._due_after, problem=problem)
        self._due = ""

    def _has_waited(self, order: str) -> bool:
        now = self._clock.monotonic()
        if self._waiting != order:
            self._waiting, self._waits_since = order, now
        return now - self._waits_since >= _PATIENCE_S

    def _answer(self, order: str, *, step: int = 0, problem: str = "") -> None:
        self._reporter.report(OrderAnswer(directive_id=order, step=step, problem=problem, at=self._clock.wall()))
