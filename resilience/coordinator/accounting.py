"""Where the lifetime of a run went: steps that were kept, and everything else by cause. Pure.

init             from the launch to the first step of the first generation
recovery         from a failure to the first step of the next generation, without loading the checkpoint
lost_work        steps that were taken again after a restart
replay, rewind, check   seconds of steps that ranks spent on running iterations again, on rewinding, and on checks
snapshot         seconds that ranks waited for copies of their state, between the steps
checkpoint_save, checkpoint_load   by what rank 0 says of its checkpoints
other            the rest: data, evaluation, waiting
"""

from __future__ import annotations

import dataclasses

from resilience.coordinator.machine.state import State

__all__ = ["Account", "account", "settled_badput_s"]

_WITHIN_STEPS = ("replay", "rewind", "check")
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
    starts = _starts(state)
    steps_s = state.telemetry.kept_s + sum(state.telemetry.durations.values())
    within_s = sum(reported.get(cause, 0.0) for cause in _WITHIN_STEPS)
    kept_s = min(lifetime_s, max(0.0, steps_s - within_s))
    badput_s = {
        "init": sum(start.seconds(end) for start in starts[:1]),
        "recovery": sum(start.seconds(end) for start in starts[1:]),
        **reported,
    }
    badput_s["other"] = max(0.0, lifetime_s - kept_s - sum(badput_s.values()))
    return Account(lifetime_s=lifetime_s, kept_s=kept_s, badput_s=dict(sorted(badput_s.items())))


def settled_badput_s(state: State) -> dict[str, float]:
    """Seconds by cause that will not become less any more, as a counter needs them: without starts that go on."""
    starts = _starts(state)
    settled = dict(state.telemetry.badput_s)
    for cause, part in (("init", starts[:1]), ("recovery", starts[1:])):
        settled[cause] = sum(start.seconds(start.until) for start in part if start.until is not None)
    return settled


@dataclasses.dataclass(frozen=True, slots=True)
class _Start:
    """The time before a generation's first step, from the launch or from the failure of the one before."""

    since: float
    until: float | None
    loading_s: float

    def seconds(self, end: float) -> float:
        return max(0.0, (end if self.until is None else self.until) - self.since - self.loading_s)


def _starts(state: State) -> list[_Start]:
    if not state.generations:
        return [_Start(state.started_at, None, 0.0)]
    starts, since = [], state.started_at
    for generation in state.generations:
        until = generation.first_step_at if generation.first_step_at is not None else generation.ended_at
        starts.append(_Start(since, until, generation.loading_s))
        since = generation.ended_at if generation.ended_at is not None else generation.began_at
    return starts
