"""The only caller of `time`. Everything else takes a `Clock`, or a time as an argument."""

from __future__ import annotations

import time
from typing import Protocol

__all__ = ["Clock", "SystemClock"]


class Clock(Protocol):
    """Two readings; `resilience.testing.FakeClock` is the other implementation."""

    def wall(self) -> float:
        """Seconds since the Unix epoch: for records that people read."""

    def monotonic(self) -> float:
        """Seconds on a clock that never goes back: for durations and deadlines."""


class SystemClock:
    """The machine's own clocks."""

    def wall(self) -> float:
        return time.time()

    def monotonic(self) -> float:
        return time.monotonic()
