"""`detection.share = "adaptive"`: solves for the shares of the sites again, now and then, from what was measured.

State and a clock around the pure solver of `adaptive.py`. Never here: checks, or a decision about a single call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from resilience.abft.adaptive import Measured, Solution, shares, site_costs
from resilience.clock import Clock
from resilience.config import DetectionConfig

__all__ = ["MEASURED_STEPS", "STEPS_BETWEEN", "Frequency"]

MEASURED_STEPS = 4
"""Steps at the beginning in which everything is checked, so that costs are known."""

STEPS_BETWEEN = 50
"""Steps between two solutions."""


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
        self._started_s = 0.0
        self.solution: Solution | None = None
        """The newest; None before there is one."""
        self.told: Callable[[Solution], None] | None = None
        """Told of every new one."""

    def step_begins(self) -> None:
        """Count a step; set new shares when it is time."""
        self._num_steps += 1
        if self._num_steps == 0:
            self._started_s = self._clock.monotonic()
            return
        if (self._num_steps - MEASURED_STEPS) % STEPS_BETWEEN or self._num_steps < MEASURED_STEPS:
            return
        config = self._config
        costs = site_costs(self._measured(), num_steps=self._num_steps)
        elapsed_s = self._clock.monotonic() - self._started_s
        if not costs or elapsed_s <= 0.0:
            return
        self.solution = shares(
            costs,
            coverage_target=config.coverage_target,
            rate_per_hour=config.fault_rate_per_hour,
            horizon_hours=config.coverage_horizon_hours,
            step_s=elapsed_s / self._num_steps,
            budget_ratio=config.overhead_budget_ratio,
        )
        self._use(self.solution.shares)
        if self.told is not None:
            self.told(self.solution)
