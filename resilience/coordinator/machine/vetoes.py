"""Decide and Conclude: one answer for each attempt of a step, and what was executed in the end."""

from __future__ import annotations

from collections.abc import Iterator

from resilience.coordinator.machine import facts as f
from resilience.coordinator.machine.commands import Conclude, Decide
from resilience.coordinator.machine.effects import RefusalKind, Refused
from resilience.coordinator.machine.members import check_generation, check_run, check_running, seat_of
from resilience.coordinator.machine.pulse import Pulse
from resilience.coordinator.machine.state import State
from resilience.coordinator.machine.supervision import take_order
from resilience.events import Decision, Detection, Evidence, Mode
from resilience.policy import decide as decide_by_table
from resilience.policy import decision_id as id_of_evidence
from resilience.policy import restarts_left

__all__ = ["check_detections", "conclude", "conclude_decision", "decide", "decision_id"]


def decision_id(command: Decide) -> str:
    """The id of the answer to `command`."""
    return id_of_evidence(command.evidence)


def decide(state: State, pulse: Pulse, command: Decide, now: float) -> Iterator[f.Fact]:
    """Rank 0 asks. The first answer to an attempt stays, whatever comes later."""
    evidence = command.evidence
    check_run(state, evidence.run_id)
    check_generation(state, evidence.generation, f"evidence of step {evidence.step}")
    check_running(state)
    if evidence.world_size != len(state.seats):
        raise Refused(
            RefusalKind.INVALID,
            f"evidence of {evidence.world_size} ranks, generation {state.generation} has {len(state.seats)}",
        )
    check_detections(state, (*evidence.detections, *evidence.previous))
    pulse.moved_at = now
    if decision_id(command) in state.decisions:
        return
    if state.mode is Mode.OFF:
        raise Refused(RefusalKind.INVALID, "this run is in mode off: nothing is decided")
    left = restarts_left(state.failures, state.limits, now=now)
    spares = _spares(state, evidence)
    decision = decide_by_table(evidence, state.limits, state.mode, now=now, restarts_left=left, spares=spares)
    yield f.DecisionMade(decision=decision, evidence=evidence)


def _spares(state: State, evidence: Evidence) -> tuple[str, ...]:
    """Spare nodes for all nodes on which an attempt alarmed again, one each; none where there are not enough.

    The ranks that alarmed now are asked about, for these are the ones that may be blamed.
    """
    nodes = dict.fromkeys(state.seats[found.rank].seat.node for found in evidence.detections if not found.mended)
    chosen: list[str] = []
    for node in nodes:
        spare = next((name for name in state.spares_for(node) if name not in chosen), None)
        if spare is None:
            return ()
        chosen.append(spare)
    return tuple(chosen)


def check_detections(state: State, detections: tuple[Detection, ...]) -> None:
    """Refuse detections of ranks or generations that are not this run's."""
    for detection in detections:
        check_generation(state, detection.generation, f"detection {detection.detection_id}")
        seat_of(state, detection.rank)


def conclude(state: State, pulse: Pulse, command: Conclude, now: float) -> Iterator[f.Fact]:
    """A rank says what it executed."""
    check_run(state, command.run_id)
    check_generation(state, command.decision.generation, f"decision {command.decision.decision_id}")
    seat_of(state, command.rank)
    if state.finished is not None:
        return
    yield from conclude_decision(state, command.decision)


def conclude_decision(state: State, decision: Decision) -> Iterator[f.Fact]:
    """What was executed overrides what was decided; telling it twice changes nothing."""
    known = state.decisions.get(decision.decision_id)
    if known == decision or f"{decision.decision_id}-superseded" in state.decisions:
        return
    yield f.Concluded(decision=decision)
    if state.order is not None and state.order.decision_id == decision.decision_id:
        yield from take_order(state)
