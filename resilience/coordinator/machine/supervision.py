"""Failures of processes, leases and hangs: from what was noticed to the decision about it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

from resilience.coordinator.machine import facts as f
from resilience.coordinator.machine.pulse import Pulse
from resilience.coordinator.machine.state import State
from resilience.events import Action, Check, Detection, DetectionKind, Outcome, RankExit
from resilience.policy import Failure, FailureKind, decide_exit, root_exit

__all__ = ["CONCLUDE_GRACE_S", "fail", "fail_of_exits", "settle_restart", "take_order", "watch"]

CONCLUDE_GRACE_S = 5.0
"""How long a restart or stop that rank 0 was told may take to be concluded before it takes effect anyway."""

_SIGTERM = 15

_NOT_TRAINING = frozenset({"starting", "done"})
"""States in which a rank owes no micro-steps."""


def fail_of_exits(state: State, pulse: Pulse, exits: Sequence[RankExit], now: float) -> Iterator[f.Fact]:
    """Ranks of the current generation ended. Later exits of the same failure change nothing."""
    exits = tuple(e for e in exits if e.generation == state.generation and e.exit_code != 0)
    if not exits or state.generation_ended or state.finished is not None:
        return
    if state.order is not None:
        yield from take_order(state)
        return
    # What an agent read from the dead rank is exact; heartbeats are older.
    step = max(e.step for e in exits) or _working_step(state, pulse)
    failure = Failure(
        generation=state.generation,
        kind=FailureKind.EXIT,
        at=now,
        step=step,
        last_verified_step=state.newest_checkpoint_step,
        exits=exits,
    )
    yield from _decide(state, failure, _detections_of(state, exits, step), now)


def fail(
    state: State,
    pulse: Pulse,
    kind: FailureKind,
    detail: str,
    now: float,
    *,
    detections: tuple[Detection, ...] = (),
    lost: str | None = None,
) -> Iterator[f.Fact]:
    """The current generation failed without an exit code; with `lost`, because that node is gone."""
    if state.generation_ended or state.finished is not None:
        return
    if state.order is not None:
        yield from take_order(state)
        return
    failure = Failure(
        generation=state.generation,
        kind=kind,
        at=now,
        step=_working_step(state, pulse),
        last_verified_step=state.newest_checkpoint_step,
        detail=detail,
        spares=() if lost is None else tuple(state.spares_for(lost)),
        wait_s=0.0 if lost is None else state.node_wait_s,
    )
    yield from _decide(state, failure, detections, now)


def _decide(state: State, failure: Failure, detections: tuple[Detection, ...], now: float) -> Iterator[f.Fact]:
    yield from settle_restart(state, None, now)
    yield f.FailureSeen(failure=failure, detections=detections)
    decision = decide_exit(state.failures, state.limits, state.mode, now=now)
    decision = dataclasses.replace(decision, evidence=tuple(d.detection_id for d in detections))
    yield f.DecisionMade(decision=decision)
    if decision.action in (Action.RESTART, Action.STOP):
        yield f.OrderTaken(decision_id=decision.decision_id)


def take_order(state: State) -> Iterator[f.Fact]:
    """A restart or stop takes effect."""
    if state.order is not None:
        yield f.OrderTaken(decision_id=state.order.decision_id)


def _working_step(state: State, pulse: Pulse) -> int:
    """The step that was being worked on; 0 before training began."""
    taken = [beat.step for beat in pulse.beats.values() if beat.step]
    taken += [seat.step for seat in state.seats.values() if seat.step]
    return max(taken) + 1 if taken else 0


def _detections_of(state: State, exits: tuple[RankExit, ...], step: int) -> tuple[Detection, ...]:
    """One detection for each rank that failed by itself; what followed from the first names it as its cause."""
    root = root_exit(exits)
    assert root is not None, "there is a failed exit"
    root_id = f"g{root.generation}-r{root.rank}-exit"
    ordered = sorted(exits, key=lambda e: (e is not root, e.exited_at, e.rank))
    return tuple(
        _process_detection(
            state,
            rank=e.rank,
            step=step,
            kind=DetectionKind.EXIT,
            caused_by=None if e is root else root_id,
            at=e.exited_at,
        )
        for e in ordered
        if e is root or e.exit_code != -_SIGTERM
    )


def _process_detection(
    state: State, *, rank: int, step: int, kind: DetectionKind, at: float, caused_by: str | None = None
) -> Detection:
    seat = state.seats[rank].seat if rank in state.seats else None
    return Detection(
        detection_id=f"g{state.generation}-r{rank}-{kind}",
        generation=state.generation,
        step=step,
        micro_step=0,
        attempt=0,
        rank=rank,
        node=seat.node if seat else "",
        device=seat.device if seat else "",
        site="process",
        layer=-1,
        check=Check.PROCESS,
        kind=kind,
        residual_ratio=math.inf,
        caused_by=caused_by,
        detected_at=at,
    )


def watch(state: State, pulse: Pulse, now: float) -> Iterator[f.Fact]:
    """What the passing of time alone shows: orders that are due, lost members, hangs."""
    if state.finished is not None:
        return
    if state.order is not None and now - state.order.at >= CONCLUDE_GRACE_S:
        yield from take_order(state)
    if state.ending is None:
        yield from _watch_nodes(state, pulse, now)
    if not state.generation_ended:
        yield from _watch_ranks(state, pulse, now)
    if not state.generation_ended:
        yield from _watch_progress(state, pulse, now)


def _watch_nodes(state: State, pulse: Pulse, now: float) -> Iterator[f.Fact]:
    """A node that has no place may go: nothing but a note follows. `placing` fills the places that are empty."""
    for name, node in state.nodes.items():
        age = pulse.age(f"agent:{name}", now)
        if not node.is_there or age <= state.lease_s:
            continue
        detail = f"node {name} is lost: its agent (pid {node.agent.pid}) has said nothing for {age:.1f} s"
        yield f.NodeLost(node=name, reason=detail)
        if not state.generation_ended and name in state.places:
            yield from fail(state, pulse, FailureKind.NODE_LOST, detail, now, lost=name)


def _watch_ranks(state: State, pulse: Pulse, now: float) -> Iterator[f.Fact]:
    for rank, seat in state.seats.items():
        age = pulse.age(f"rank:{rank}", now)
        if seat.joined and seat.left is None and age > state.lease_s:
            detail = f"rank {rank} on {seat.seat.node} (pid {seat.pid}) has said nothing for {age:.1f} s"
            step = _working_step(state, pulse)
            lost = _process_detection(state, rank=rank, step=step, kind=DetectionKind.HANG, at=now)
            yield from fail(state, pulse, FailureKind.RANK_LOST, detail, now, detections=(lost,))
            return


def _watch_progress(state: State, pulse: Pulse, now: float) -> Iterator[f.Fact]:
    idle = now - max(pulse.moved_at, pulse.since)
    busy = [rank for rank, seat in state.seats.items() if seat.joined and seat.left is None]
    beats = [pulse.beats.get(rank) for rank in busy]
    if idle <= state.limits.hang_timeout_s or not busy or any(b is None or b.state in _NOT_TRAINING for b in beats):
        return
    slowest = min(busy, key=lambda rank: (pulse.beats[rank].step, pulse.beats[rank].micro_step, rank))
    step = _working_step(state, pulse)
    detail = (
        f"no rank has finished a micro-step for {idle:.0f} s; rank {slowest} is behind the others or first among equals"
    )
    hang = _process_detection(state, rank=slowest, step=step, kind=DetectionKind.HANG, at=now)
    yield from fail(state, pulse, FailureKind.HANG, detail, now, detections=(hang,))


def settle_restart(state: State, sampled: f.Sampled | None, now: float) -> Iterator[f.Fact]:
    """Close the newest restart: with the first step of the new generation, or as failed if there was none.

    `sampled` is the sample that brings the first steps, before it is folded; None when the generation failed.
    """
    open_ones = (d for d in state.decisions.values() if (d.action, d.outcome) == (Action.RESTART, Outcome.PENDING))
    restart = next((d for d in open_ones if d.generation < state.generation), None)
    if restart is None:
        return
    failure = next(x for x in state.failures if x.generation == restart.generation)
    latency_ms = (now - failure.at) * 1000.0
    if sampled is None:
        yield f.RestartSettled(
            decision_id=restart.decision_id, outcome=Outcome.FAILED, latency_ms=latency_ms, lost_s=0.0, resumed_step=0
        )
    elif sampled.durations:
        first = sampled.durations[0][0]
        yield f.RestartSettled(
            decision_id=restart.decision_id,
            outcome=Outcome.SUCCEEDED,
            latency_ms=latency_ms,
            lost_s=_lost_s(state, first, failure.step),
            resumed_step=first - 1,
        )


def _lost_s(state: State, first: int, failed: int) -> float:
    """Seconds of the steps from `first` to the one before `failed`, which are taken again.

    The newest of them may have died with their ranks before a heartbeat told of them: they count as the mean step.
    """
    known = state.telemetry.durations
    again = [seconds for step, seconds in known.items() if step >= first]
    num_untold = max(0, failed - first - len(again))
    mean_s = sum(known.values()) / len(known) if known else 0.0
    return sum(again, 0.0) + num_untold * mean_s
