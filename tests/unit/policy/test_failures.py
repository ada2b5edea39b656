"""Failures of processes: the restart budget, exit codes that are passed on, and when to give up."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from resilience.config import PolicyConfig
from resilience.events import Action, Mode, RankExit
from resilience.policy import EXIT_RULES, Failure, FailureKind, decide_exit, restarts_left, root_exit

LIMITS = PolicyConfig(max_restarts=3, restart_window_s=100.0, max_failures_without_progress=2)


def left(rank: int, code: int, at: float = 10.0, message: str = "") -> RankExit:
    return RankExit(
        generation=1, rank=rank, node="a", device=f"device-{rank}", exit_code=code, message=message, exited_at=at
    )


def failed(*exits: RankExit, at: float = 10.0, step: int = 7, verified: int = 0, **changes: Any) -> Failure:
    known = Failure(
        generation=1,
        kind=FailureKind.EXIT,
        at=at,
        step=step,
        last_verified_step=verified,
        exits=exits,
        detail="a detail",
    )
    return dataclasses.replace(known, **changes)


KILLED = failed(left(1, -9), left(0, -15, at=11.0))
CRASHED = failed(left(0, 1, message="ValueError: bad batch"))
ABORTED = failed(left(0, -6, message="ValueError: bad batch"))
"""The same exception, where the end of the interpreter aborts in a library's destructors."""

CASES: list[tuple[str, Action, int | None, list[Failure], Mode]] = [
    ("done", Action.CONTINUE, 0, [failed(left(0, 0), left(1, 0))], Mode.ENFORCE),
    ("says-itself", Action.STOP, 75, [failed(left(0, 75), left(1, 75))], Mode.ENFORCE),
    ("says-itself", Action.STOP, 93, [failed(left(0, 75), left(1, 93))], Mode.ENFORCE),
    ("says-itself", Action.STOP, 64, [failed(left(0, 64), left(1, 93))], Mode.ENFORCE),
    ("shadow", Action.STOP, 137, [KILLED], Mode.SHADOW),
    ("shadow", Action.STOP, 1, [CRASHED], Mode.SHADOW),
    ("node-lost", Action.STOP, 75, [failed(kind=FailureKind.NODE_LOST)], Mode.ENFORCE),
    ("node-lost", Action.STOP, 75, [failed(kind=FailureKind.NODE_LOST)], Mode.SHADOW),
    ("node-lost-spare", Action.RESTART, None, [failed(kind=FailureKind.NODE_LOST, spares=("c",))], Mode.ENFORCE),
    ("node-lost", Action.STOP, 75, [failed(kind=FailureKind.NODE_LOST, spares=("c",))], Mode.SHADOW),
    ("node-lost", Action.STOP, 75, [*[KILLED] * 3, failed(kind=FailureKind.NODE_LOST, spares=("c",))], Mode.ENFORCE),
    ("node-lost-wait", Action.RESTART, None, [failed(kind=FailureKind.NODE_LOST, wait_s=60.0)], Mode.ENFORCE),
    (
        "cordoned-device-spare",
        Action.RESTART,
        None,
        [failed(kind=FailureKind.CORDONED, spares=("c",))],
        Mode.ENFORCE,
    ),
    ("cordoned-device", Action.STOP, 75, [failed(kind=FailureKind.CORDONED)], Mode.ENFORCE),
    ("restart-processes", Action.RESTART, None, [KILLED], Mode.ENFORCE),
    ("restart-processes", Action.RESTART, None, [CRASHED], Mode.ENFORCE),
    ("restart-processes", Action.RESTART, None, [KILLED, KILLED, KILLED], Mode.ENFORCE),
    ("restart-processes", Action.RESTART, None, [failed(kind=FailureKind.HANG)], Mode.ENFORCE),
    ("no-progress", Action.STOP, 93, [CRASHED, CRASHED], Mode.ENFORCE),
    ("no-progress", Action.STOP, 93, [CRASHED, ABORTED], Mode.ENFORCE),
    ("restart-processes", Action.RESTART, None, [failed(left(0, -6)), failed(left(0, -6))], Mode.ENFORCE),
    ("restart-processes", Action.RESTART, None, [CRASHED, dataclasses.replace(CRASHED, step=9)], Mode.ENFORCE),
    (
        "restart-processes",
        Action.RESTART,
        None,
        [CRASHED, dataclasses.replace(CRASHED, last_verified_step=5)],
        Mode.ENFORCE,
    ),
    ("restart-processes", Action.RESTART, None, [CRASHED, KILLED, CRASHED], Mode.ENFORCE),
    ("budget-used-up", Action.STOP, 75, [KILLED] * 4, Mode.ENFORCE),
    ("restart-processes", Action.RESTART, None, [*[KILLED] * 3, failed(left(1, -9), at=200.0)], Mode.ENFORCE),
]


@pytest.mark.parametrize(
    ("rule", "action", "code", "history", "mode"), CASES, ids=[f"{i}-{c[0]}" for i, c in enumerate(CASES)]
)
def test_the_row_that_applies(rule: str, action: Action, code: int | None, history: list[Failure], mode: Mode) -> None:
    decision = decide_exit(history, LIMITS, mode, now=history[-1].at)
    assert (decision.rule, decision.action, decision.exit_code) == (rule, action, code)
    assert decision.decision_id == "g1-exit"
    assert decision.reason


def test_every_row_is_reached_by_a_case() -> None:
    assert {case[0] for case in CASES} == {rule.name for rule in EXIT_RULES}


def test_the_reason_names_rank_step_and_what_it_said() -> None:
    reason = decide_exit([CRASHED], LIMITS, now=10.0).reason
    assert "rank 0 on a ended with code 1 at step 7 (ValueError: bad batch)" in reason
    assert "1 of at most 3" in reason
    assert "SIGKILL" in decide_exit([KILLED], LIMITS, now=10.0).reason


def test_a_signal_without_a_name_is_told_by_its_number() -> None:
    assert "signal 200" in decide_exit([failed(left(0, -200))], LIMITS, now=10.0).reason


@pytest.mark.parametrize(
    ("exits", "rank"),
    [
        ([left(0, -15, at=9.0), left(1, -9, at=10.0)], 1),  # SIGTERM is the agent's doing
        ([left(0, 1, at=10.0), left(1, -9, at=10.4)], 1),  # polled together: the crash came first
        ([left(0, 1, at=10.0), left(1, -9, at=16.0)], 0),  # SIGKILL after the grace is the agent's doing
        ([left(0, -15, at=9.0)], 0),
        ([left(0, 0), left(1, 3)], 1),
    ],
)
def test_the_exit_that_the_others_followed_from(exits: list[RankExit], rank: int) -> None:
    root = root_exit(exits)
    assert root is not None
    assert root.rank == rank


def test_nobody_failed() -> None:
    assert root_exit([left(0, 0)]) is None


def test_the_budget_comes_back_with_time() -> None:
    assert restarts_left([KILLED, KILLED], LIMITS, now=20.0) == 1
    assert restarts_left([KILLED, KILLED], LIMITS, now=500.0) == 3
    assert restarts_left([KILLED] * 9, LIMITS, now=20.0) == 0
