"""One fact into the state. Total and deterministic: the same facts give the same state, in whatever process.

`fold` returns what must be remembered outside of the run (device histories) and the end of the run as effects. They are
idempotent, so a recovered coordinator executes them again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from resilience.coordinator.machine import damage, ledger, snapshots
from resilience.coordinator.machine import facts as f
from resilience.coordinator.machine.effects import Effect, Finish, RememberCordon
from resilience.coordinator.machine.state import (
    MAX_DURATIONS,
    Asked,
    Cordon,
    Ending,
    GenerationRecord,
    Node,
    Order,
    RankSeat,
    State,
    places_of,
)
from resilience.coordinator.machine.story import tell
from resilience.events import Action, CheckpointFact, CheckpointKind, Decision, Outcome, Verdict
from resilience.policy import Failure, FailureKind

__all__ = ["fold"]


def fold(state: State, fact: f.Fact, at: float) -> list[Effect]:
    """Bring `fact`, which happened at `at`, into `state`."""
    effects = _FOLDS[type(fact)](state, fact, at)
    tell(state, fact, at)
    return effects


def _opened(state: State, fact: f.Opened, at: float) -> list[Effect]:
    state.run_id, state.mode, state.limits = fact.run_id, fact.mode, fact.limits
    state.lease_s, state.started_at = fact.lease_s, fact.started_at
    state.config_digest = fact.config_digest
    state.num_spare_nodes, state.node_wait_s = fact.num_spare_nodes, fact.node_wait_s
    if fact.version:
        state.versions["resilience"] = fact.version
    return []


def _recovered(state: State, fact: f.Recovered, at: float) -> list[Effect]:
    return []


def _cordon_set(state: State, fact: f.CordonSet, at: float) -> list[Effect]:
    for device, node in fact.devices:
        if fact.cordoned:
            state.cordons[device] = Cordon(node, fact.reason, at)
        else:
            state.cordons.pop(device, None)
    if fact.by == "history":
        return []
    return [RememberCordon(device, node, fact.cordoned, fact.reason, at) for device, node in fact.devices]


def _agent_joined(state: State, fact: f.AgentJoined, at: float) -> list[Effect]:
    state.nodes[fact.agent.node] = Node(fact.agent)
    return []


def _agent_waits(state: State, fact: f.AgentWaits, at: float) -> list[Effect]:
    node = state.nodes[fact.node]
    node.waiting, node.is_done, node.master_port = True, fact.is_done, fact.master_port
    return []


def _node_lost(state: State, fact: f.NodeLost, at: float) -> list[Effect]:
    node = state.nodes[fact.node]
    node.lost_at, node.waiting, node.is_done = at, False, False
    return []


def _inventory_told(state: State, fact: f.InventoryTold, at: float) -> list[Effect]:
    node = state.nodes[fact.node]
    node.guardian_address, node.copies = fact.guardian_address, fact.copies
    return []


def _generation_began(state: State, fact: f.GenerationBegan, at: float) -> list[Effect]:
    assert fact.generation == state.generation + 1, "generations only grow, one at a time"
    state.generation, state.generation_ended, state.order = fact.generation, False, None
    begun_after = fact.restore.step if fact.restore is not None and fact.restore.is_snapshot else 0
    state.seats = {seat.rank: RankSeat(seat, step=begun_after) for seat in fact.seats}
    record = GenerationRecord(fact.generation, at, len(fact.seats), fact.reason, restore=fact.restore)
    record.places = places_of(fact.seats)
    state.generations.append(record)
    state.telemetry.rank_checks.clear()
    snapshots.go_back(state, fact.restore)
    _say_origin(state, fact)
    for name, _ in record.places:  # spare ones go on waiting
        state.nodes[name].waiting = state.nodes[name].is_done = False
    return []


def _say_origin(state: State, fact: f.GenerationBegan) -> None:
    """Where the state comes from is known only now that every node has said what it holds."""
    if fact.restore is None:
        return
    for decision in list(state.decisions.values()):
        if decision.action is Action.RESTART and decision.outcome is Outcome.PENDING:
            reason = f"{decision.reason}; generation {fact.generation} begins from {fact.restore.reason}"
            state.decisions[decision.decision_id] = dataclasses.replace(decision, reason=reason)


def _rank_joined(state: State, fact: f.RankJoined, at: float) -> list[Effect]:
    seat = state.seats[fact.rank]
    seat.joined, seat.pid, seat.left = True, fact.pid, None
    state.versions.update(fact.versions)
    return []


def _reported(state: State, fact: f.Reported, at: float) -> list[Effect]:
    effects: list[Effect] = []
    for detection in fact.detections:
        effects += ledger.note_detection(state, detection, at)
    state.strikes.update((strike.strike_id, strike) for strike in fact.strikes)
    state.checkpoints.extend(fact.checkpoints)
    if fact.member == "rank:0":
        _account_checkpoints(state, fact.checkpoints)
    snapshots.note(state, fact)
    for answer in fact.answers:
        for wish, asked in state.asked.items():
            if answer.directive_id == f"{wish}-{asked.number}":
                asked.answer = answer
    state.notes.extend(fact.notes)
    if fact.deterministic is not None:
        state.deterministic = fact.deterministic
    state.telemetry.num_skipped_steps += fact.num_skipped_steps
    kind, _, name = fact.member.partition(":")
    if kind == "rank" and int(name) in state.seats:
        state.seats[int(name)].sequence = fact.sequence
    return effects


def _account_checkpoints(state: State, points: tuple[CheckpointFact, ...]) -> None:
    """All ranks save and load together, so rank 0 stands for the run."""
    for point in points:
        if point.kind is CheckpointKind.DOUBTED:
            continue
        saved = point.kind is CheckpointKind.PUBLISHED
        if point.kind is CheckpointKind.LOADED:
            state.loaded_checkpoints.append(point)
            for seat in state.seats.values():
                seat.step = max(seat.step, point.step)
        _add(state.telemetry.badput_s, "checkpoint_save" if saved else "checkpoint_load", point.seconds)
        if not saved and state.generations[-1].first_step_at is None:
            state.generations[-1].loading_s += point.seconds


def _decision_made(state: State, fact: f.DecisionMade, at: float) -> list[Effect]:
    decision, effects = fact.decision, []
    if fact.evidence is not None:
        state.evidence[decision.decision_id] = fact.evidence
        for detection in fact.evidence.detections:
            effects += ledger.note_detection(state, detection, at)
    state.decisions[decision.decision_id] = decision
    if decision.action in (Action.RESTART, Action.STOP) and decision.outcome is Outcome.PENDING:
        state.order = Order(decision.decision_id, decision.action, at)
    return effects + ledger.note_decision(state, decision, at)


def _concluded(state: State, fact: f.Concluded, at: float) -> list[Effect]:
    executed = fact.decision
    known = state.decisions.get(executed.decision_id)
    if known is not None and known.action is not executed.action:
        late = dataclasses.replace(
            known, decision_id=f"{known.decision_id}-superseded", outcome=Outcome.SUPERSEDED, verdicts=()
        )
        state.decisions[late.decision_id] = late
        if state.order is not None and state.order.decision_id == executed.decision_id:
            state.order = None
    state.decisions[executed.decision_id] = executed if known is None else ledger.merged(known, executed)
    return ledger.note_decision(state, state.decisions[executed.decision_id], at)


def _order_taken(state: State, fact: f.OrderTaken, at: float) -> list[Effect]:
    decision = state.decisions[fact.decision_id]
    state.order = None
    if decision.action is Action.RESTART:
        if not any(failure.generation == decision.generation for failure in state.failures):
            state.failures.append(_veto(state, decision, at))
            state.generations[-1].damaged = True
        # Rank 0 said that it left; whether the restart succeeded shows in the next generation.
        state.decisions[fact.decision_id] = dataclasses.replace(decision, outcome=Outcome.PENDING)
        _end_generation(state, decision.reason, at)
    else:
        assert decision.action is Action.STOP, "only restarts and stops are ordered"
        state.ending = Ending(decision.exit_code or 0, decision.reason, decision.decision_id)
        _end_generation(state, decision.reason, at)
        if decision.outcome is Outcome.PENDING:
            state.decisions[fact.decision_id] = dataclasses.replace(decision, outcome=Outcome.SUCCEEDED)
    effects: list[Effect] = []
    for device in decision.cordon:
        effects += _quarantine(state, decision, device, at)
    return effects


def _veto(state: State, decision: Decision, at: float) -> Failure:
    return Failure(
        generation=decision.generation,
        kind=FailureKind.VETO,
        at=at,
        step=decision.step,
        last_verified_step=state.newest_checkpoint_step,
        detail=decision.reason,
    )


def _quarantine(state: State, decision: Decision, device: str, at: float) -> list[Effect]:
    node = next((d.node for d in state.detections.values() if d.device == device), "")
    record = dataclasses.replace(
        decision,
        decision_id=f"{decision.decision_id}-quarantine-{device}",
        action=Action.QUARANTINE,
        reason=f"{device} is out of use: {decision.reason}",
        verdicts=(),
        cordon=(device,),
        exit_code=None,
        outcome=Outcome.SUCCEEDED,
    )
    state.decisions[record.decision_id] = record
    state.cordons[device] = Cordon(node, decision.reason, at)
    state.tell(at, "decision", f"quarantine: {record.reason}", step=decision.step)
    return [RememberCordon(device, node, True, decision.reason, at)]


def _end_generation(state: State, reason: str, at: float) -> None:
    state.generation_ended = True
    if state.generations and state.generations[-1].ended_at is None:
        record = state.generations[-1]
        record.ended_at, record.ended_by = at, reason
        record.rewinding_to = damage.rewinding_to(state)
        record.damaged |= damage.is_unsettled(state)


def _failure_seen(state: State, fact: f.FailureSeen, at: float) -> list[Effect]:
    state.failures.append(fact.failure)
    effects: list[Effect] = []
    for detection in fact.detections:
        effects += ledger.note_detection(state, detection, at)
    return effects


def _restart_settled(state: State, fact: f.RestartSettled, at: float) -> list[Effect]:
    decision = dataclasses.replace(
        state.decisions[fact.decision_id],
        outcome=fact.outcome,
        latency_ms=fact.latency_ms,
        lost_s=fact.lost_s,
    )
    state.decisions[fact.decision_id] = decision
    ledger.note_execution(state, decision)
    effects: list[Effect] = []
    if fact.outcome is Outcome.SUCCEEDED:
        state.generations[-1].resumed_after = fact.resumed_step
    if fact.outcome is Outcome.SUCCEEDED:
        for name in decision.evidence:
            effects += ledger.settle(state, name, Verdict.TRANSIENT, at)
    return effects


def _sampled(state: State, fact: f.Sampled, at: float) -> list[Effect]:
    telemetry = state.telemetry
    for rank, step in fact.steps:
        state.seats[rank].step = step
    for rank, name in fact.states:
        state.seats[rank].state = name
    for cause, seconds in fact.badput:
        _add(telemetry.badput_s, cause, seconds)
    if fact.first_step_at is not None:
        state.generations[-1].first_step_at = fact.first_step_at
    for step, seconds in fact.durations:
        telemetry.num_steps_taken += 1
        repeated = telemetry.durations.pop(step, None)
        if repeated is not None:
            telemetry.num_repeated_steps += 1
            _add(telemetry.badput_s, "lost_work", repeated)
        telemetry.durations[step] = seconds
        if len(telemetry.durations) > MAX_DURATIONS:
            telemetry.kept_s += telemetry.durations.popitem(last=False)[1]
    for rank, site, count in fact.checks:
        before = telemetry.rank_checks.get((rank, site), 0)
        telemetry.checks[site] = telemetry.checks.get(site, 0) + max(0, count - before)
        telemetry.rank_checks[rank, site] = count
    for seen in fact.observations:
        telemetry.histogram(seen.metric, seen.label).add(seen.counts, seen.total)
    telemetry.num_snapshots += fact.num_snapshots
    state.snapshot_steps.update(fact.snapshot_steps)
    if fact.snapshot_interval_steps is not None:
        state.snapshot_interval_steps = fact.snapshot_interval_steps
    state.last_verified_step = max(state.last_verified_step, fact.last_verified_step)
    state.loss = fact.loss if fact.loss is not None else state.loss
    state.tokens_per_s = fact.tokens_per_s if fact.tokens_per_s is not None else state.tokens_per_s
    return []


def _add(sums: dict[str, float], key: str, value: float) -> None:
    sums[key] = sums.get(key, 0.0) + value


def _member_left(state: State, fact: f.MemberLeft, at: float) -> list[Effect]:
    kind, _, name = fact.member.partition(":")
    if kind == "agent":
        state.nodes[name].left, state.nodes[name].left_at = fact.exit_code, at
        # A spare node that leaves takes nothing with it.
        if fact.exit_code != 0 and state.ending is None and name in state.places:
            state.ending = Ending(fact.exit_code, fact.reason or f"the agent of {name} left with {fact.exit_code}")
    elif kind == "rank" and fact.generation == state.generation:
        state.seats[int(name)].left = fact.exit_code
    return []


def _ranks_done(state: State, fact: f.RanksDone, at: float) -> list[Effect]:
    state.ending = Ending(0, "all ranks ended with 0")
    _end_generation(state, "all ranks ended with 0", at)
    return []


def _drain_asked(state: State, fact: f.DrainAsked, at: float) -> list[Effect]:
    state.drain = fact.reason
    return []


def _ranks_asked(state: State, fact: f.RanksAsked, at: float) -> list[Effect]:
    before = state.asked.get(fact.wish)
    number = 1 if before is None else before.number + 1
    state.asked[fact.wish] = Asked(number, state.generation, fact.reason, fact.step, at)
    return []


def _finished(state: State, fact: f.Finished, at: float) -> list[Effect]:
    state.finished = Ending(fact.exit_code, fact.reason)
    state.finished_at, state.outcome = at, fact.outcome
    _end_generation(state, fact.reason, at)
    return [Finish(fact.exit_code)]


_FOLDS: dict[type, Callable[[State, Any, float], list[Effect]]] = {
    f.Opened: _opened,
    f.Recovered: _recovered,
    f.CordonSet: _cordon_set,
    f.AgentJoined: _agent_joined,
    f.AgentWaits: _agent_waits,
    f.NodeLost: _node_lost,
    f.InventoryTold: _inventory_told,
    f.GenerationBegan: _generation_began,
    f.RankJoined: _rank_joined,
    f.Reported: _reported,
    f.DecisionMade: _decision_made,
    f.Concluded: _concluded,
    f.OrderTaken: _order_taken,
    f.FailureSeen: _failure_seen,
    f.RestartSettled: _restart_settled,
    f.Sampled: _sampled,
    f.MemberLeft: _member_left,
    f.RanksDone: _ranks_done,
    f.DrainAsked: _drain_asked,
    f.RanksAsked: _ranks_asked,
    f.Finished: _finished,
}
assert set(_FOLDS) == set(f.FACTS.values()), "every fact has its fold"
