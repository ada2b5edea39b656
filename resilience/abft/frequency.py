"""`detection.share = "adaptive"`: solves for the shares of the sites again, now and then, from what was measured.

State and a clock around the pure solver of `adaptive.py`. Never here: checks, or a decision about a single call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from resilience.abft.adaptive import Measured, SiteCost, Solution, shares, site_costs
from resilience.clock import Clock
from resilience.config import DetectionConfig

__all__ = ["MEASURED_STEPS", "STEPS_BETWEEN", "Frequency"]

MEASURED_STEPS = 4
"""Steps at the beginning in which everything is checked, so that costs are known; the first counts for nothing."""

STEPS_BETWEEN = 50
"""Steps between two solutions."""


class _Point(NamedTuple):
    """What was known at the beginning of a step."""

    num_steps: int
    at_s: float
    measured: Mapping[str, Measured]


class Frequency:
    """Shares of the calls of each site, by coverage target or budget. Ranks need not agree on them.

    Args:
        config: target, rate, horizon and budget.
        measured: what was counted at each site since the process began.
        use: takes new shares.
        clock: monotonic time of steps.
    """

    def __init__(
        self,
        config: DetectionConfig,
        *,
        measured: Callable[[], Mapping[str, Measured]],
        use: Callable[[Mapping[str, float]], None],
        clock: Clock,
    ) -> None:
        self._config = config
        self._measured = measured
        self._use = use
        self._clock = clock
        self._num_steps = -1
        self._since = _Point(0, 0.0, {})
        self._check_s: dict[str, float] = {}
        """Of one check of each site, the newest that is known."""
        self.solution: Solution | None = None
        """The newest; None before there is one."""
        self.told: Callable[[Solution], None] | None = None
        """Told of every new one."""

    def step_begins(self) -> None:
        """Count a step; set new shares when it is time."""
        self._num_steps += 1
        if self._num_steps == 1:
            self._since = self._now()  # the first step warms up
        if (self._num_steps - MEASURED_STEPS) % STEPS_BETWEEN or self._num_steps < MEASURED_STEPS:
            return
        now, since = self._now(), self._since
        self._since = now
        num_steps, elapsed_s = now.num_steps - since.num_steps, now.at_s - since.at_s
        measured = {
            site: one - since.measured[site] if site in since.measured else one for site, one in now.measured.items()
        }
        costs = site_costs(measured, num_steps=num_steps, check_s=self._check_s)
        self._check_s.update({site: one.check_s / one.num_checks for site, one in measured.items() if one.num_checks})
        if costs and elapsed_s > 0.0:
            self._solve(costs, elapsed_s / num_steps)

    def _now(self) -> _Point:
        return _Point(self._num_steps, self._clock.monotonic(), self._measured())

    def _solve(self, costs: Mapping[str, SiteCost], step_s: float) -> None:
        config = self._config
        self.solution = shares(
            costs,
            coverage_target=config.coverage_target,
            rate_per_hour=config.fault_rate_per_hour,
            horizon_hours=config.coverage_horizon_hours,
            step_s=step_s,
            budget_ratio=config.overhead_budget_ratio,
        )
        self._use(self.solution.shares)
        if self.told is not None:
            self.told(self.solution)
