"""One report of a member: what is new becomes facts, the heartbeat goes to the pulse."""

from __future__ import annotations

from collections.abc import Iterator

from resilience.coordinator.machine import facts as f
from resilience.coordinator.machine.commands import Report
from resilience.coordinator.machine.members import check_member, check_run
from resilience.coordinator.machine.pulse import Pulse, sample, sample_interval_s
from resilience.coordinator.machine.snapshots import is_expected, is_news
from resilience.coordinator.machine.state import State
from resilience.coordinator.machine.supervision import fail_of_exits, settle_restart
from resilience.coordinator.machine.vetoes import check_detections, conclude_decision
from resilience.events import Verdict

__all__ = ["flush", "report"]


def report(state: State, pulse: Pulse, command: Report, now: float) -> Iterator[f.Fact]:
    """Take a report; what was reported before, under whatever sequence, is left out."""
    check_run(state, command.run_id)
    if state.finished is not None:
        return
    check_member(state, command.member, command.generation)
    check_detections(state, command.detections)
    pulse.seen[command.member] = now
    is_new = command.sequence > max(pulse.sequences.get(command.member, 0), _journaled_sequence(state, command.member))
    fact = _news(state, command, is_new=is_new)
    if fact is not None:
        yield fact
    for decision in command.decisions:
        if decision.generation == state.generation:
            yield from conclude_decision(state, decision)
    yield from _take_pulse(state, pulse, command, now, is_new=is_new)
    yield from fail_of_exits(state, pulse, command.exits, now)


def _journaled_sequence(state: State, member: str) -> int:
    kind, _, name = member.partition(":")
    return state.seats[int(name)].sequence if kind == "rank" else 0


def _news(state: State, command: Report, *, is_new: bool) -> f.Reported | None:
    detections = tuple(
        d
        for d in command.detections
        if d.detection_id not in state.detections
        or (state.detections[d.detection_id].verdict is Verdict.PENDING and d.verdict is not Verdict.PENDING)
    )
    strikes = tuple(s for s in command.strikes if s.strike_id not in state.strikes)
    checkpoints = tuple(c for c in command.checkpoints if c not in state.checkpoints)
    told = tuple(s for s in command.snapshots if is_news(state, command.generation, s))
    answers = tuple(a for a in command.answers if is_expected(state, a))
    notes = tuple(n for n in command.notes if n not in state.notes)
    measured = command.deterministic if command.deterministic != state.deterministic else None
    skipped = command.num_skipped_steps if is_new else 0
    if not (detections or strikes or checkpoints or told or answers or notes or skipped) and measured is None:
        return None
    return f.Reported(
        generation=command.generation,
        member=command.member,
        sequence=command.sequence,
        detections=detections,
        strikes=strikes,
        checkpoints=checkpoints,
        snapshots=told,
        answers=answers,
        notes=notes,
        deterministic=measured,
        num_skipped_steps=skipped,
    )


def _take_pulse(state: State, pulse: Pulse, command: Report, now: float, *, is_new: bool) -> Iterator[f.Fact]:
    kind, _, name = command.member.partition(":")
    if is_new:
        pulse.sequences[command.member] = command.sequence
        pulse.take_badput(state, command.badput_seconds)
        pulse.take_snapshots(command.snapshots)
    if kind == "rank" and command.heartbeat is not None:
        pulse.take_beat(state, int(name), command.heartbeat, is_new=is_new, now=now)
    is_first_step = pulse.first_step_at is not None
    if is_first_step or now - pulse.sampled_at >= sample_interval_s(len(state.seats)):
        yield from flush(state, pulse, now)


def flush(state: State, pulse: Pulse, now: float) -> Iterator[f.Fact]:
    """Journal what the heartbeats said since the last sample."""
    fact = sample(state, pulse, now)
    if fact is None:
        return
    yield from settle_restart(state, fact, now) if fact.durations else ()
    yield fact
