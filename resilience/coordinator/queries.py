"""What people ask of a run: from the state to the messages of the Operator service. Pure.

The service answers with these functions from the live machine, and the command with the same ones from a journal.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from google.protobuf.message import Message

from resilience.coordinator.accounting import account
from resilience.coordinator.devices import DeviceRecord
from resilience.coordinator.machine import Machine
from resilience.coordinator.machine.facts import Wish
from resilience.coordinator.machine.snapshots import on_the_path
from resilience.coordinator.machine.state import State, StoryLine
from resilience.events import Decision, Detection, SnapshotFact, SnapshotKind
from resilience.policy import EXIT_RULES, RULES, judge, restarts_left
from resilience.rpc.codec import MAX_MESSAGE_BYTES, clip, to_proto
from resilience.rpc.v1 import operator_pb2 as op

__all__ = [
    "event_to_proto",
    "events_after",
    "explain_decision",
    "get_run",
    "list_checkpoints",
    "list_decisions",
    "list_detections",
    "list_devices",
    "list_ranks",
    "newest_step",
    "run_state",
    "snapshot_answer",
]

_ROOM_BYTES = MAX_MESSAGE_BYTES * 7 // 8
M = TypeVar("M", bound=Message)


def run_state(state: State) -> str:
    """One word: waiting, training, restarting, draining, finished or failed."""
    if state.finished is not None:
        return "finished" if state.finished.exit_code == 0 else "failed"
    if state.ending is not None or state.drain is not None:
        return "draining"
    if state.generation == 0:
        return "waiting"
    return "restarting" if state.generation_ended else "training"


def get_run(machine: Machine, *, now: float, pid: int = 0) -> op.Run:
    """The run at a glance."""
    state, beats = machine.state, machine.pulse.beats
    rates = [beat.tokens_per_s for beat in beats.values() if beat.tokens_per_s is not None]
    lead = beats.get(0)
    run = op.Run(
        run_id=state.run_id,
        state=run_state(state),
        mode=str(state.mode),
        generation=state.generation,
        world_size=len(state.seats),
        step=newest_step(machine),
        goodput_ratio=account(state, now).goodput_ratio,
        started_at=state.started_at,
        now=now,
        last_verified_step=max(
            state.last_verified_step, min((b.last_verified_step for b in beats.values()), default=0)
        ),
        num_detections=sum(1 for d in state.detections.values() if d.caused_by is None),
        num_decisions=len(state.decisions),
        last_event=clip(state.story[-1].text) if state.story else "",
        restarts_left=restarts_left(state.failures, state.limits, now=now),
        pid=pid,
    )
    loss = lead.loss if lead is not None else state.loss
    if loss is not None:
        run.loss = loss
    tokens_per_s = sum(rates) if rates else state.tokens_per_s
    if tokens_per_s is not None:
        run.tokens_per_s = tokens_per_s
    if state.deterministic is not None:
        run.deterministic = state.deterministic
    ending = state.finished or state.ending
    if ending is not None:
        run.exit_code = ending.exit_code
    return run


def newest_step(machine: Machine) -> int:
    """Newest step that all ranks have taken."""
    beats = machine.pulse.beats
    steps = [max(seat.step, beats[rank].step if rank in beats else 0) for rank, seat in machine.state.seats.items()]
    return min(steps, default=0)


def list_ranks(machine: Machine, *, now: float) -> op.ListRanksResponse:
    """The ranks of the current generation."""
    return op.ListRanksResponse(ranks=[_rank_state(machine, rank, now) for rank in sorted(machine.state.seats)])


def _rank_state(machine: Machine, rank: int, now: float) -> op.RankState:
    state, beat = machine.state, machine.pulse.beats.get(rank)
    seat = state.seats[rank]
    age_s = max(0.0, machine.pulse.age(f"rank:{rank}", now)) if state.finished is None else 0.0
    message = op.RankState(
        rank=rank,
        node=seat.seat.node,
        device=seat.seat.device,
        pid=seat.pid,
        state=beat.state if beat is not None else seat.state,
        step=max(seat.step, beat.step if beat is not None else 0),
        heartbeat_age_s=age_s,
    )
    if seat.left is not None:
        message.state = "done" if seat.left == 0 else f"left with {seat.left}"
    elif state.generation_ended:
        message.state = "ended"
    elif age_s > state.lease_s:
        message.state = "lost"
    if beat is not None and beat.loss is not None:
        message.loss = beat.loss
    if beat is not None and beat.step_seconds is not None:
        message.step_seconds = beat.step_seconds
    return message


def list_snapshots(machine: Machine) -> op.ListSnapshotsResponse:
    """Memory snapshots that were told of lately, newest first."""
    record = machine.state.generations[-1] if machine.state.generations else None
    nodes = {name for name, _ in record.places} if record is not None else set()
    found = [_snapshot(step, generation, facts, nodes) for (step, generation), facts in machine.pulse.snapshots.items()]
    told: list[op.SnapshotState] = [
        snapshot
        for snapshot in found
        if snapshot is not None
        and (snapshot.tier == "disk" or on_the_path(machine.state, snapshot.step, snapshot.generation, at=snapshot.at))
    ]
    told.sort(key=_age, reverse=True)
    _only_newest_parity(told)
    return op.ListSnapshotsResponse(snapshots=told)


def _only_newest_parity(snapshots: Iterable[op.SnapshotState]) -> None:
    """Guardians keep the parity of one snapshot: that of older ones goes when the next one counts. Newest first."""
    is_found = False
    for snapshot in snapshots:
        if is_found:
            snapshot.redundancy = 0
            snapshot.tier = "memory" if snapshot.tier == "peer" else snapshot.tier
        is_found = is_found or snapshot.redundancy > 0


def _age(snapshot: op.SnapshotState) -> tuple[int, int]:
    return snapshot.generation, snapshot.step


def _snapshot(
    step: int, generation: int, facts: Mapping[tuple[str, SnapshotKind], SnapshotFact], nodes: set[str]
) -> op.SnapshotState | None:
    taken = {node: fact for (node, kind), fact in facts.items() if kind is SnapshotKind.TAKEN}
    if not taken:
        return None
    redundancies = [fact.redundancy for (_, kind), fact in facts.items() if kind is SnapshotKind.PROTECTED]
    is_protected = len(redundancies) == len(taken)
    is_flushed = any(kind is SnapshotKind.FLUSHED for _, kind in facts)
    return op.SnapshotState(
        step=step,
        generation=generation,
        tier="disk" if is_flushed else "peer" if is_protected else "memory",
        num_bytes=sum(fact.num_bytes for fact in taken.values()),
        clean_through=max(fact.clean_through for fact in facts.values()),
        redundancy=min(redundancies) if is_protected else 0,
        complete=set(taken) >= nodes,
        at=max(fact.at for fact in taken.values()),
        seconds=max(fact.seconds for fact in taken.values()),
        node=clip(",".join(sorted(taken))),
    )


def snapshot_answer(state: State, generation: int) -> op.TakeSnapshotNowResponse | None:
    """What became of the newest order for a snapshot, which `generation` was given; None while nobody has said."""
    asked = state.asked[Wish.SNAPSHOT]
    kinds = op.TakeSnapshotNowResponse
    if asked.answer is not None and asked.answer.problem:
        return kinds(answer=kinds.NOT_TAKEN, generation=asked.generation, reason=clip(asked.answer.problem))
    if asked.answer is not None:
        return kinds(answer=kinds.TAKEN, generation=asked.generation, step=asked.answer.step)
    if state.generation != generation or state.generation_ended or state.finished is not None:
        reason = f"generation {generation} ended before its ranks had answered; ask again when the run trains"
        return kinds(answer=kinds.NOT_TAKEN, generation=generation, reason=reason)
    return None


def list_detections(state: State, *, include_propagated: bool = False, limit: int = 0) -> op.ListDetectionsResponse:
    """Detections, oldest first; root causes only unless asked."""
    chosen = [d for d in state.detections.values() if include_propagated or d.caused_by is None]
    return op.ListDetectionsResponse(detections=_newest([to_proto(d) for d in _last(chosen, limit)]))


def list_decisions(state: State, *, limit: int = 0) -> op.ListDecisionsResponse:
    """Decisions, oldest first."""
    ordered = sorted(state.decisions.values(), key=lambda d: d.decided_at)
    return op.ListDecisionsResponse(decisions=_newest([to_proto(d) for d in _last(ordered, limit)]))


def explain_decision(state: State, decision_id: str) -> op.Explanation | None:
    """Why a decision was taken, or None where there is no such decision."""
    decision = state.decisions.get(decision_id)
    if decision is None:
        return None
    texts = {rule.name: rule.text for rule in RULES} | {rule.name: rule.text for rule in EXIT_RULES}
    detections: Iterable[Detection] = (state.detections[d] for d in decision.evidence if d in state.detections)
    return op.Explanation(
        decision=to_proto(decision),
        detections=_newest([to_proto(d) for d in detections]),
        rule=decision.rule,
        rule_text=texts.get(decision.rule, ""),
        considered=_considered(state, decision),
    )


def _considered(state: State, decision: Decision) -> tuple[str, ...]:
    evidence = state.evidence.get(decision.decision_id)
    if evidence is None:
        return ()
    before = [failure for failure in state.failures if failure.at < decision.decided_at]
    left = restarts_left(before, state.limits, now=decision.decided_at)
    # Who waited at that time is not in the evidence; the row that applied says whether somebody did.
    spares = ("a spare node",) if decision.rule == "persistent-spare" else ()
    return judge(evidence, state.limits, now=decision.decided_at, restarts_left=left, spares=spares).considered


def list_checkpoints(state: State) -> op.ListCheckpointsResponse:
    """What happened to checkpoints, oldest first."""
    return op.ListCheckpointsResponse(checkpoints=_newest([to_proto(c) for c in state.checkpoints]))


def events_after(state: State, sequence: int) -> list[op.Event]:
    """The lines of the story after `sequence`, oldest first."""
    return [event_to_proto(line) for line in state.story if line.sequence > sequence]


def event_to_proto(line: StoryLine) -> op.Event:
    """A line of the story as a message."""
    return op.Event(
        sequence=line.sequence,
        at=line.at,
        kind=line.kind,
        text=clip(line.text),
        generation=line.generation,
        step=line.step,
    )


def list_devices(state: State, history: Sequence[DeviceRecord] = ()) -> op.ListDevicesResponse:
    """The run's devices with their history, then those that only the history knows; by node."""
    records = {record.device: record for record in history}
    nodes = {device.device: name for name, node in state.nodes.items() for device in node.agent.devices}
    for device in (*state.cordons, *records):
        nodes.setdefault(device, records[device].node if device in records else state.cordons[device].node)
    found = []
    for device, node in nodes.items():
        record, cordon = records.get(device), state.cordons.get(device)
        found.append(
            op.DeviceState(
                device=device,
                node=node,
                cordoned=record.cordoned if record is not None else cordon is not None,
                reason=clip(cordon.reason if cordon is not None else record.reason if record is not None else ""),
                num_transient=record.num_transient if record is not None else 0,
                num_persistent=record.num_persistent if record is not None else 0,
                last_fault_at=record.last_fault_at if record is not None else 0.0,
            )
        )
    return op.ListDevicesResponse(devices=found)


T = TypeVar("T")


def _last(items: Sequence[T], limit: int) -> Sequence[T]:
    return items[-limit:] if limit else items


def _newest(messages: Sequence[M]) -> list[M]:
    """The newest of `messages` that one answer has room for, oldest first."""
    room, kept = _ROOM_BYTES, []
    for message in reversed(messages):
        room -= message.ByteSize() + 8
        if room < 0:
            break
        kept.append(message)
    return kept[::-1]
