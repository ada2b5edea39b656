"""How often to take a snapshot: Young's and Daly's compromise within a budget, from what was measured. Pure.

A snapshot that blocks training for C seconds every T, with failures every M seconds on average, costs C/T + T/(2·M) of
the time; that is least for T = √(2·C·M) (Young 1974; Daly 2006, eq. 12, first order). Never more often than the budget
allows: C/T ≤ budget.
"""

from __future__ import annotations

import math

__all__ = ["Pace", "steps_between"]

_SMOOTHING = 0.25
"""Weight of the newest value in the running means."""
_MAX_ROOM_MADE = 16
"""So often a snapshot may make room for itself, once for each slot, before that counts as what they cost."""


def steps_between(*, blocked_s: float, step_s: float, budget_ratio: float, seconds_between_failures: float) -> int:
    """Steps between two snapshots, at least 1.

    Args:
        blocked_s: how long one snapshot blocks training.
        step_s: seconds of a step without it.
        budget_ratio: most of the time that snapshots may take.
        seconds_between_failures: of the whole job, on average.
    """
    assert step_s > 0.0, "a step takes time"
    young_s = math.sqrt(2.0 * blocked_s * seconds_between_failures)
    allowed_s = blocked_s / budget_ratio
    return max(1, math.ceil(max(young_s, allowed_s) / step_s))


class Pace:
    """When a rank wants its next snapshot; ranks differ, and the slowest one decides.

    Args:
        fixed: steps between two; None to follow what is measured.
        budget_ratio: see `steps_between`.
        seconds_between_failures: see `steps_between`.
    """

    def __init__(self, fixed: int | None, *, budget_ratio: float, seconds_between_failures: float) -> None:
        self._fixed = fixed
        self._budget_ratio = budget_ratio
        self._seconds_between_failures = seconds_between_failures
        self._step_s = 0.0
        self._blocked_s = 0.0
        self._num_untypical = 0
        self._last: int | None = None

    @property
    def interval(self) -> int:
        """Steps between two snapshots, as things stand."""
        if self._fixed is not None:
            return self._fixed
        if not self._step_s or not self._blocked_s:
            return 1
        return steps_between(
            blocked_s=self._blocked_s,
            step_s=self._step_s,
            budget_ratio=self._budget_ratio,
            seconds_between_failures=self._seconds_between_failures,
        )

    def is_due(self, step: int) -> bool:
        """Whether to take one after `step`. The first one is: it tells what they cost."""
        return self._last is None or step - self._last >= self.interval

    def step_took(self, seconds: float) -> None:
        """A step took so long, snapshots not counted."""
        self._step_s = _mean(self._step_s, seconds)

    def taken(self, step: int, blocked_s: float, *, is_typical: bool) -> None:
        """A snapshot was taken. One that had to make room for itself first says nothing about the next ones."""
        self._last = step
        self._num_untypical = 0 if is_typical else self._num_untypical + 1
        if is_typical or self._num_untypical > _MAX_ROOM_MADE:
            self._blocked_s = _mean(self._blocked_s, blocked_s)

    def starts_at(self, step: int) -> None:
        """The state came from the snapshot of this step."""
        self._last = step


def _mean(mean: float, value: float) -> float:
    return value if not mean else mean + _SMOOTHING * (value - mean)
