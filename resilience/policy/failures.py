"""What to do about a failure of processes: restart within the budget, or stop, and with which code. Pure.

A failure ends a generation: a rank exited or hangs, a node is gone, or a veto asked for a restart. The table below is
tried from the top over the whole history of the run's failures, the newest last.
"""

from __future__ import annotations

import dataclasses
import enum
import signal
from collections.abc import Callable, Sequence
from functools import cached_property

from resilience.config import PolicyConfig
from resilience.errors import ExitCode
from resilience.events import Action, Decision, Mode, RankExit

__all__ = ["EXIT_RULES", "ExitRule", "Failure", "FailureKind", "decide_exit", "restarts_left", "root_exit"]

_PASSED_ON = (ExitCode.USAGE, ExitCode.DO_NOT_REQUEUE, ExitCode.REQUEUE, ExitCode.UNAVAILABLE)
"""Codes that already say what a launcher should do, most binding first."""

_SAME_MOMENT_S = 1.0
"""Exits closer than this are one event: agents poll, so their order means nothing."""


class FailureKind(enum.StrEnum):
    """What ended a generation."""

    EXIT = "exit"
    HANG = "hang"
    RANK_LOST = "rank_lost"
    NODE_LOST = "node_lost"
    VETO = "veto"
    AGENT = "agent"
    CORDONED = "cordoned"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """How one generation ended before its time."""

    generation: int
    kind: FailureKind
    at: float
    """Seconds since the Unix epoch."""
    step: int = 0
    """The step that was being worked on; 0 when none had begun."""
    last_verified_step: int = 0
    """Step of the newest verified checkpoint at that time: progress is what a restart would not lose."""
    exits: tuple[RankExit, ...] = ()
    detail: str = ""
    """What is known in words, where no process left an exit code."""
    spares: tuple[str, ...] = ()
    """With a lost node or a cordoned device: nodes that could take its place."""
    wait_s: float = 0.0
    """With a lost node: how long it is waited for, where no other can take its place."""


@dataclasses.dataclass(frozen=True)
class _History:
    failures: Sequence[Failure]
    limits: PolicyConfig
    mode: Mode
    now: float

    @property
    def newest(self) -> Failure:
        return self.failures[-1]

    @cached_property
    def root(self) -> RankExit | None:
        return root_exit(self.newest.exits)

    @cached_property
    def passed_code(self) -> int | None:
        codes = {e.exit_code for e in self.newest.exits}
        return next((int(code) for code in _PASSED_ON if code in codes), None)

    @cached_property
    def left(self) -> int:
        return restarts_left(self.failures[:-1], self.limits, now=self.now)

    @property
    def is_lost_node(self) -> bool:
        return self.newest.kind is FailureKind.NODE_LOST

    @property
    def may_restart(self) -> bool:
        return self.mode is not Mode.SHADOW and self.left > 0

    @cached_property
    def no_progress(self) -> int:
        """How many failures in a row, the newest included, are the same one again without a newly verified step."""
        count = 0
        for failure in reversed(self.failures):
            if _signature(failure) is None or _signature(failure) != _signature(self.newest):
                break
            count += 1
        return count


def _signature(failure: Failure) -> tuple[object, ...] | None:
    """What makes two failures the same; None for those that say nothing about data or code."""
    root = root_exit(failure.exits)
    if root is None:
        return None
    # After an unhandled exception the interpreter's end may abort in the communication library's destructors, or not.
    code = 1 if root.exit_code == -signal.SIGABRT and root.message else root.exit_code
    return None if code <= 0 else (code, failure.step, failure.last_verified_step)


def root_exit(exits: Sequence[RankExit]) -> RankExit | None:
    """The exit that the others followed from: the earliest, a crash by signal before its neighbours' error codes.

    SIGTERM is how agents end the neighbours, so it is a cause only when there is nothing else.
    """
    failed = [e for e in exits if e.exit_code != 0]
    causes = [e for e in failed if e.exit_code != -signal.SIGTERM] or failed
    if not causes:
        return None
    first = min(e.exited_at for e in causes)
    together = [e for e in causes if e.exited_at - first <= _SAME_MOMENT_S]
    return min(together, key=lambda e: (e.exit_code > 0, e.exited_at, e.rank))


def restarts_left(failures: Sequence[Failure], limits: PolicyConfig, *, now: float) -> int:
    """What is left of the restart budget after `failures`, each of which cost one restart."""
    recent = sum(1 for failure in failures if now - failure.at <= limits.restart_window_s)
    return max(0, limits.max_restarts - recent)


def _what(history: _History) -> str:
    failure, root = history.newest, history.root
    if root is None:
        return failure.detail or f"generation {failure.generation} ended ({failure.kind})"
    how = f"code {root.exit_code}" if root.exit_code > 0 else f"signal {_signal_name(-root.exit_code)}"
    where = f"at step {failure.step}" if failure.step else "before its first step"
    said = f" ({root.message})" if root.message else ""
    return f"rank {root.rank} on {root.node} ended with {how} {where}{said}"


def _count(history: _History) -> str:
    limit = history.limits.max_restarts
    return f" ({limit - history.left + 1} of at most {limit} restarts)"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return str(number)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ExitRule:
    """One row for failures of processes."""

    name: str
    text: str
    when: Callable[[_History], bool]
    action: Action
    reason: Callable[[_History], str]
    exit_code: ExitCode | None = None
    passes_code: bool = False
    """The run ends with the code that the rank ended with."""


EXIT_RULES: tuple[ExitRule, ...] = (
    ExitRule(
        name="done",
        text="all ranks ended with 0: the run is done",
        when=lambda h: (
            h.newest.kind is FailureKind.EXIT and bool(h.newest.exits) and all(e.exit_code == 0 for e in h.newest.exits)
        ),
        action=Action.CONTINUE,
        exit_code=ExitCode.DONE,
        reason=lambda h: "all ranks ended with 0",
    ),
    ExitRule(
        name="says-itself",
        text="a rank ended with 64, 93, 75 or 69, which say themselves what to do: stop with that code",
        when=lambda h: h.passed_code is not None,
        action=Action.STOP,
        passes_code=True,
        reason=lambda h: f"{_what(h)}: {h.passed_code} asks to stop",
    ),
    ExitRule(
        name="cordoned-device-spare",
        text="a device that the launch asks for is out of use: a spare node takes the place of its node",
        when=lambda h: h.newest.kind is FailureKind.CORDONED and bool(h.newest.spares),
        action=Action.RESTART,
        reason=lambda h: f"{_what(h)}; {h.newest.spares[0]}, a spare node, takes its place",
    ),
    ExitRule(
        name="cordoned-device",
        text="a device that the launch asks for is out of use, and this run has no spare one: stop, requeue",
        when=lambda h: h.newest.kind is FailureKind.CORDONED,
        action=Action.STOP,
        exit_code=ExitCode.REQUEUE,
        reason=_what,
    ),
    ExitRule(
        name="node-lost-spare",
        text="a node is gone, restarts are left in the window, and a spare node waits: new generation with that one",
        when=lambda h: h.is_lost_node and h.may_restart and bool(h.newest.spares),
        action=Action.RESTART,
        reason=lambda h: f"{_what(h)}; {h.newest.spares[0]}, a spare node, takes its place: restart{_count(h)}",
    ),
    ExitRule(
        name="node-lost-wait",
        text="a node is gone, restarts are left in the window, and it may come back: new generation once it has",
        when=lambda h: h.is_lost_node and h.may_restart and h.newest.wait_s > 0,
        action=Action.RESTART,
        reason=lambda h: (
            f"{_what(h)}; there is no spare node, it is waited for {h.newest.wait_s:g} s: restart{_count(h)}"
        ),
    ),
    ExitRule(
        name="node-lost",
        text="a node is gone, and no other takes its place: stop, requeue",
        when=lambda h: h.is_lost_node,
        action=Action.STOP,
        exit_code=ExitCode.REQUEUE,
        reason=lambda h: (
            f"{_what(h)}; {'the restart budget is used up' if h.newest.spares else 'there is no spare node'}"
        ),
    ),
    ExitRule(
        name="shadow",
        text="in shadow mode nothing is restarted: the run ends as the rank did",
        when=lambda h: h.mode is Mode.SHADOW,
        action=Action.STOP,
        passes_code=True,
        reason=lambda h: f"{_what(h)}; shadow mode does not restart",
    ),
    ExitRule(
        name="no-progress",
        text="the same exit code at the same step, again and again, without a newly verified step: data or code",
        when=lambda h: h.no_progress >= h.limits.max_failures_without_progress,
        action=Action.STOP,
        exit_code=ExitCode.DO_NOT_REQUEUE,
        reason=lambda h: (
            f"{_what(h)}, {h.no_progress} times in a row without a newly verified step: it would come again"
        ),
    ),
    ExitRule(
        name="restart-processes",
        text="restarts are left in the window: new generation from the newest snapshot or checkpoint that can be had",
        when=lambda h: h.left > 0,
        action=Action.RESTART,
        reason=lambda h: f"{_what(h)}: restart{_count(h)}",
    ),
    ExitRule(
        name="budget-used-up",
        text="the restart budget is used up: stop, requeue",
        when=lambda h: True,
        action=Action.STOP,
        exit_code=ExitCode.REQUEUE,
        reason=lambda h: (
            f"{_what(h)}; the budget of {h.limits.max_restarts} restarts in {h.limits.restart_window_s:g} s is used up"
        ),
    ),
)


def decide_exit(
    failures: Sequence[Failure], limits: PolicyConfig, mode: Mode = Mode.ENFORCE, *, now: float
) -> Decision:
    """What to do about the newest of `failures`, the earlier ones of the run before it.

    Returns:
        `restart`; `stop` with its exit code; or `continue` with exit code 0, when every rank ended with 0.
    """
    assert failures, "there is no failure to decide about"
    history = _History(failures, limits, mode, now)
    rule = next(rule for rule in EXIT_RULES if rule.when(history))
    return Decision(
        decision_id=f"g{history.newest.generation}-exit",
        generation=history.newest.generation,
        step=history.newest.step,
        attempt=0,
        action=rule.action,
        reason=rule.reason(history),
        exit_code=_run_code(history, rule),
        decided_at=now,
        rule=rule.name,
    )


def _run_code(history: _History, rule: ExitRule) -> int | None:
    if not rule.passes_code:
        return None if rule.exit_code is None else int(rule.exit_code)
    if history.passed_code is not None:
        return history.passed_code
    code = history.root.exit_code if history.root is not None else int(ExitCode.FAILED)
    return code if code > 0 else 128 - code
