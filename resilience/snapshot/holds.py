"""Which snapshots ranks must not overwrite, as `holds.json`: the guardian writes, ranks read before they begin a copy.

A rank may have begun a copy in the very moment that a hold is written. Whoever takes a hold looks again afterwards
whether the commits are still there.
"""

from __future__ import annotations

import contextlib
import threading

from resilience.errors import SnapshotError
from resilience.snapshot.arena import Arena, write_atomically
from resilience.snapshot.manifest import Hold, parse_holds, serialise_holds

__all__ = ["HASHING", "RESTORE", "Holds", "read_holds"]

HASHING = "hashing"
RESTORE = "restore"
_OUTLIVES_ITS_GUARDIAN = frozenset({RESTORE})


def read_holds(arena: Arena) -> tuple[Hold, ...]:
    """What must not be overwritten; nothing where nobody has said anything that can be read."""
    try:
        return parse_holds(arena.holds.read_bytes(), source=str(arena.holds))
    except (OSError, SnapshotError):
        return ()


class Holds:
    """The holds of one guardian process. May be used by several threads."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._lock = threading.Lock()
        self._holds = {hold for hold in read_holds(arena) if hold.why in _OUTLIVES_ITS_GUARDIAN}
        with contextlib.suppress(OSError):  # the arena is being removed
            self._write(self._holds)

    def add(self, hold: Hold) -> None:
        """Hold a snapshot.

        Raises:
            OSError: ranks cannot be told; then it is not held.
        """
        with self._lock:
            if hold not in self._holds:
                self._write({*self._holds, hold})

    def has(self, why: str) -> bool:
        """Whether anything is held for this reason."""
        with self._lock:
            return any(hold.why == why for hold in self._holds)

    def drop(self, why: str) -> None:
        """Give up all holds of one reason.

        Raises:
            OSError: ranks cannot be told; then they are held still.
        """
        with self._lock:
            kept = {hold for hold in self._holds if hold.why != why}
            if kept != self._holds:
                self._write(kept)

    def _write(self, holds: set[Hold]) -> None:
        write_atomically(self._arena.holds, serialise_holds(holds))
        self._holds = holds
