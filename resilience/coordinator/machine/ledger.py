"""Detections, verdicts and decisions as they come in: each told once, settled once, whatever the order of arrival."""

from __future__ import annotations

import dataclasses

from resilience.coordinator.machine.effects import Effect, RememberFault
from resilience.coordinator.machine.state import State
from resilience.events import Action, Check, Decision, Detection, Outcome, Verdict
from resilience.metrics import BY_NAME, bucket_of

__all__ = ["blames_a_device", "merged", "note_decision", "note_detection", "note_execution", "settle"]

_CLEAR = frozenset({"", "clean", "mended", "replayed-clean", "rewound-clean", "order-refused"})
"""Rules that say that the attempt raised no alarm; empty where a rank did not name one."""

_OF_A_DEVICE = frozenset({Verdict.TRANSIENT, Verdict.PERSISTENT})


def note_detection(state: State, detection: Detection, at: float) -> list[Effect]:
    """A detection arrived, alone or within evidence, perhaps again."""
    known = state.detections.get(detection.detection_id)
    if known is None:
        observe(state, "detection_latency_seconds", detection.latency_ms / 1000.0)
    if known is not None and known.verdict is not Verdict.PENDING:
        return []
    state.detections[detection.detection_id] = dataclasses.replace(detection, verdict=Verdict.PENDING)
    verdict = state.verdicts.get(detection.detection_id, detection.verdict)
    if verdict is Verdict.PENDING and detection.caused_by is not None and not detection.mended:
        verdict = Verdict.PROPAGATED
    return settle(state, detection.detection_id, verdict, at)


def settle(state: State, detection_id: str, verdict: Verdict, at: float) -> list[Effect]:
    """Give a detection its verdict. The first one stays."""
    if verdict is Verdict.PENDING:
        return []
    state.verdicts.setdefault(detection_id, verdict)
    detection = state.detections.get(detection_id)
    if detection is None or detection.verdict not in (Verdict.PENDING, verdict):
        return []
    if detection.verdict is verdict:
        return []
    state.detections[detection_id] = dataclasses.replace(detection, verdict=verdict)
    blames = blames_a_device(detection)
    if verdict in _OF_A_DEVICE and blames:
        fault_id = f"g{detection.generation}-s{detection.step}"
        return [RememberFault(fault_id, detection.device, detection.node, verdict, at)]
    return []


def blames_a_device(detection: Detection) -> bool:
    """Whether it tells of the device that it was seen on.

    Copies that differ and could not be rebuilt do not: either may be the right one. What is not finite in the weights
    is on every rank, whoever computed it; a loss says even less.
    """
    if detection.check in (Check.PROCESS, Check.LOSS, Check.OPERATOR):
        return False
    of_state = detection.check is Check.SCREEN and detection.site in ("weight", "optimizer")
    return detection.mended or not (of_state or detection.check is Check.REPLICA)


def note_decision(state: State, decision: Decision, at: float) -> list[Effect]:
    """What a decision says of detections, of the replay before it, and of skipped steps."""
    effects: list[Effect] = []
    for name, verdict in decision.verdicts:
        effects += settle(state, name, verdict, at)
    if decision.attempt > 0:
        cleared = decision.action in (Action.CONTINUE, Action.CORRECTED) and decision.rule in _CLEAR
        _settle_replay(state, decision, Outcome.SUCCEEDED if cleared else Outcome.FAILED)
    if decision.action is Action.REPLAY and decision.outcome is Outcome.SUCCEEDED:
        effects += _settle_step(state, decision, Verdict.TRANSIENT, at)
    elif decision.action is not Action.REPLAY and decision.attempt > 0:
        effects += _settle_step(state, decision, _verdict_of_step(decision), at)
    if decision.rule in ("data-non-finite", "unmeasured-non-finite") and decision.step != state.skipped_at_step:
        evidence = state.evidence.get(decision.decision_id)
        before = evidence.consecutive_skips if evidence is not None else state.num_skips_in_a_row
        state.skipped_at_step, state.num_skips_in_a_row = decision.step, before + 1
    note_execution(state, decision)
    return effects


def note_execution(state: State, decision: Decision) -> None:
    """Once it is known how long a decision took, count it once."""
    name = decision.decision_id
    if decision.outcome is Outcome.PENDING or decision.latency_ms <= 0 or name in state.telemetry.timed:
        return
    state.telemetry.timed.add(name)
    observe(state, "decision_seconds", decision.latency_ms / 1000.0)


def merged(known: Decision, executed: Decision) -> Decision:
    """What was decided, with what was executed laid over it. Several ranks may report the same one."""
    if known.action is not executed.action:
        return executed
    return dataclasses.replace(
        executed,
        reason=executed.reason or known.reason,
        verdicts=tuple(dict((*known.verdicts, *executed.verdicts)).items()),
        evidence=tuple(dict.fromkeys((*known.evidence, *executed.evidence))),
        cordon=known.cordon or executed.cordon,
        exit_code=known.exit_code if executed.exit_code is None else executed.exit_code,
        outcome=known.outcome if executed.outcome is Outcome.PENDING else executed.outcome,
        latency_ms=max(known.latency_ms, executed.latency_ms),
        lost_s=max(known.lost_s, executed.lost_s),
        decided_at=known.decided_at or executed.decided_at,
        rule=known.rule or executed.rule,
    )


def observe(state: State, metric: str, value: float) -> None:
    """One value into a histogram."""
    counts = [0] * (len(BY_NAME[metric].buckets) + 1)
    counts[bucket_of(BY_NAME[metric], value)] = 1
    state.telemetry.histogram(metric).add(tuple(counts), value)


def _settle_replay(state: State, decision: Decision, outcome: Outcome) -> None:
    """The attempt after a replay shows how the replay ended."""
    name = f"{decision.decision_id.rpartition('-a')[0]}-a{decision.attempt - 1}"
    replay = state.decisions.get(name)
    if replay is not None and replay.action is Action.REPLAY and replay.outcome is Outcome.PENDING:
        state.decisions[name] = dataclasses.replace(replay, outcome=outcome)


def _verdict_of_step(decision: Decision) -> Verdict:
    """What a decision after replays says of everything that was seen in its step. Alarms come last in its verdicts."""
    found = [verdict for _, verdict in decision.verdicts if verdict is not Verdict.PROPAGATED]
    return found[-1] if found else Verdict.PENDING


def _settle_step(state: State, decision: Decision, verdict: Verdict, at: float) -> list[Effect]:
    """Give `verdict` to what was seen in the step up to this attempt, and has none yet."""
    effects: list[Effect] = []
    for detection in list(state.detections.values()):
        same = (detection.generation, detection.step) == (decision.generation, decision.step)
        if same and detection.check is not Check.PROCESS and detection.attempt <= decision.attempt:
            effects += settle(state, detection.detection_id, verdict, at)
    return effects
