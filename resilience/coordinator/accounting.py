"""Where the lifetime of a run went: steps that were kept, and everything else by cause. Pure.

init             from the launch to the first step of the first generation
recovery         from a failure to the first step of the next generation, without loading the checkpoint
lost_work        steps that were taken again after a restart
replay, check    seconds of steps that ranks spent on running iterations again and on checks
checkpoint_save, checkpoint_load   as reported by ranks
other            the rest: data, evaluation, waiting
"""

from __future__ import annotations

import dataclasses

from resilience.coordinator.machine.state import State

__all__ = ["Account", "account"]

_WITHIN_STEPS = ("replay", "check")
"""Causes whose seconds the duration of a step contains."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """All in seconds; `kept_s` and the causes add up to `lifetime_s`."""

    lifetime_s: float
    kept_s: float
    badput_s: dict[str, float]

    @property
    def goodput_ratio(self) -> float:
        """Share of the lifetime spent on steps that were kept."""
        return self.kept_s / self.lifetime_s if self.lifetime_s > 0 else 0.0


def account(state: State, now: float) -> Account:
    """The account of the run up to `now`, or up to its end."""
    end = now if state.finished_at is None else state.finished_at
    lifetime_s = max(0.0, end - state.started_at)
    reported = dict(state.telemetry.badput_s)
    init_s, recovery_s = _starts(state, end)
    recovery_s = max(0.0, recovery_s - reported.get("checkpoint_load", 0.0))
    steps_s = state.telemetry.kept_s + sum(state.telemetry.durations.values())
    within_s = sum(reported.get(cause, 0.0) for cause in _WITHIN_STEPS)
    kept_s = min(lifetime_s, max(0.0, steps_s - within_s))
    badput_s = {"init": init_s, "recovery": recovery_s, **reported}
    badput_s["other"] = max(0.0, lifetime_s - kept_s - sum(badput_s.values()))
    return Account(lifetime_s=lifetime_s, kept_s=kept_s, badput_s=dict(sorted(badput_s.items())))


def _starts(state: State, end: float) -> tuple[float, float]:
    """Seconds until the first generation stepped, and from each failure until the next one did."""
    if not state.generations:
        return max(0.0, end - state.started_at), 0.0
    first = state.generations[0]
    init_s = (first.first_step_at or first.ended_at or end) - state.started_at
    recovery_s = 0.0
    for before, after in zip(state.generations, state.generations[1:], strict=False):
        failed_at = before.ended_at if before.ended_at is not None else after.began_at
        recovery_s += (after.first_step_at or after.ended_at or end) - failed_at
    return max(0.0, init_s), max(0.0, recovery_s)
