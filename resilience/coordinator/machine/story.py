"""Facts as lines for people: what `resilience events` shows. Called by `fold`, after the state has changed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from resilience.coordinator.machine import facts as f
from resilience.coordinator.machine.state import About, State
from resilience.events import Action, Decision, Detection, Outcome

__all__ = ["detection_line", "tell"]


def tell(state: State, fact: f.Fact, at: float) -> None:
    """Add the lines that `fact` is worth; heartbeats are worth none."""
    teller = _TELLERS.get(type(fact))
    if teller is not None:
        teller(state, fact, at)


def detection_line(d: Detection) -> str:
    """A detection, as one line."""
    layer = f"[{d.layer}]" if d.layer >= 0 else ""
    micro = f" micro-step {d.micro_step}" if d.micro_step else ""
    mended = ", mended in place" if d.mended else ""
    cause = f", caused by {d.caused_by}" if d.caused_by else ""
    where = f"{d.site}{layer} on rank {d.rank}, step {d.step}{micro}"
    return f"{d.detection_id}: {d.kind} in {where} ({d.check}){mended}{cause}"


def _whereabouts(d: Detection) -> About:
    return {"detection_id": d.detection_id, "rank": d.rank, "node": d.node, "device": d.device, "site": d.site}


def _decision_line(decision: Decision) -> str:
    return f"{decision.decision_id}: {decision.action}: {decision.reason}"


def _about(decision: Decision) -> About:
    return {"decision_id": decision.decision_id, "action": decision.action, "outcome": decision.outcome}


def _led_here(state: State, *actions: Action) -> About:
    """The decision, if there is one, of which this is the outcome."""
    for decision in reversed(state.decisions.values()):
        if decision.action in actions and decision.outcome is Outcome.PENDING:
            return {"decision_id": decision.decision_id}
    return {}


def _opened(state: State, fact: f.Opened, at: float) -> None:
    state.tell(at, "note", f"run {fact.run_id} opened in mode {fact.mode}", about={"mode": fact.mode})


def _recovered(state: State, fact: f.Recovered, at: float) -> None:
    state.tell(at, "note", f"the coordinator came back from its journal (pid {fact.pid})")


def _cordon_set(state: State, fact: f.CordonSet, at: float) -> None:
    what = "out of use" if fact.cordoned else "back in use"
    for device, node in fact.devices:
        text = f"{device} is {what} ({fact.by}): {fact.reason or 'no reason given'}"
        decided = next((d for d in reversed(state.decisions.values()) if device in d.cordon), None)
        because: About = {} if decided is None or fact.by != "policy" else {"decision_id": decided.decision_id}
        state.tell(at, "note", text, about={"device": device, "node": node, **because})


def _agent_joined(state: State, fact: f.AgentJoined, at: float) -> None:
    agent = fact.agent
    state.tell(
        at,
        "member",
        f"agent of {agent.node} joined with {len(agent.devices)} devices (pid {agent.pid})",
        about={"node": agent.node},
    )


def _node_lost(state: State, fact: f.NodeLost, at: float) -> None:
    if fact.node not in state.places:
        what = ", a spare one"
    else:
        what = f"; it is waited for {state.node_wait_s:g} s" if state.node_wait_s else ""
    state.tell(at, "member", fact.reason + what, about={"node": fact.node})


def _generation_began(state: State, fact: f.GenerationBegan, at: float) -> None:
    origin = "" if fact.restore is None else f" from {fact.restore.reason}"
    text = f"generation {fact.generation} begins on {len(fact.seats)} ranks{origin}: {fact.reason}"
    state.tell(at, "generation", text, about=_led_here(state, Action.RESTART))
    for line in () if fact.restore is None else fact.restore.passed_over:
        state.tell(at, "snapshot", f"not taken: {line}", about=_led_here(state, Action.RESTART))


def _reported(state: State, fact: f.Reported, at: float) -> None:
    for strike in fact.strikes:
        text = f"{strike.strike_id}: injected {strike.kind} in {strike.site}[{strike.layer}] on rank {strike.rank}"
        state.tell(
            at,
            "strike",
            text + (" (no effect)" if strike.no_effect else ""),
            step=strike.step,
            about={"rank": strike.rank},
        )
    _tell_detections(state, fact.detections, at)
    for point in fact.checkpoints:
        text = f"checkpoint {point.tag} in {point.directory} {point.kind}" + (
            f": {point.reason}" if point.reason else ""
        )
        state.tell(at, "checkpoint", text, step=point.step)
    for answer in fact.answers:
        text = f"not carried out: {answer.problem}" if answer.problem else f"carried out after step {answer.step}"
        state.tell(at, "note", f"order {answer.directive_id} {text}", step=answer.step)
    for note in fact.notes:
        state.tell(at, "note", f"{note.kind}: {note.message}", step=note.step)


def _tell_detections(state: State, detections: Iterable[Detection], at: float) -> None:
    """A rank tells of one in its evidence, in its next report, or in both."""
    for detection in detections:
        if detection.detection_id not in state.told:
            state.told.add(detection.detection_id)
            state.tell(at, "detection", detection_line(detection), step=detection.step, about=_whereabouts(detection))


def _decision_made(state: State, fact: f.DecisionMade, at: float) -> None:
    if fact.evidence is not None:
        _tell_detections(state, fact.evidence.detections, at)
    state.tell(at, "decision", _decision_line(fact.decision), step=fact.decision.step, about=_about(fact.decision))


def _concluded(state: State, fact: f.Concluded, at: float) -> None:
    d = fact.decision
    text = f"{d.decision_id}: {d.action} executed on the word of the {d.origin}: {d.outcome}"
    state.tell(at, "decision", text, step=d.step, about=_about(d))


def _failure_seen(state: State, fact: f.FailureSeen, at: float) -> None:
    failure = fact.failure
    for end in failure.exits:
        text = f"rank {end.rank} on {end.node} ended with {end.exit_code}" + (f": {end.message}" if end.message else "")
        where: About = {"rank": end.rank, "node": end.node, "device": end.device, "exit_code": end.exit_code}
        state.tell(at, "exit", text, step=failure.step, about=where)
    if not failure.exits:
        state.tell(at, "exit", f"{failure.kind}: {failure.detail}", step=failure.step)


def _restart_settled(state: State, fact: f.RestartSettled, at: float) -> None:
    took = f"{fact.latency_ms / 1000:.1f} s"
    text = f"{fact.decision_id}: restart {fact.outcome}, {took}, resumed after step {fact.resumed_step}"
    about: About = {"decision_id": fact.decision_id, "action": Action.RESTART, "outcome": fact.outcome}
    state.tell(at, "decision", text, step=fact.resumed_step, about=about)


def _member_left(state: State, fact: f.MemberLeft, at: float) -> None:
    why = f": {fact.reason}" if fact.reason else ""
    state.tell(at, "member", f"{fact.member} of generation {fact.generation} left with {fact.exit_code}{why}")


def _ranks_done(state: State, fact: f.RanksDone, at: float) -> None:
    state.tell(at, "member", "all ranks ended with 0")


def _drain_asked(state: State, fact: f.DrainAsked, at: float) -> None:
    state.tell(at, "note", f"drain asked for: {fact.reason or 'no reason given'}")


def _ranks_asked(state: State, fact: f.RanksAsked, at: float) -> None:
    where = "" if fact.step is None else f" to the snapshot of step {fact.step}"
    state.tell(at, "note", f"{fact.wish}{where} asked for: {fact.reason or 'no reason given'}")


def _finished(state: State, fact: f.Finished, at: float) -> None:
    text = f"run ended with {fact.exit_code} ({fact.outcome}): {fact.reason}"
    state.tell(
        at,
        "finished",
        text,
        about={"exit_code": fact.exit_code, "outcome": fact.outcome, **_led_here(state, Action.STOP)},
    )


_TELLERS: dict[type, Callable[[State, Any, float], None]] = {
    f.Opened: _opened,
    f.Recovered: _recovered,
    f.CordonSet: _cordon_set,
    f.AgentJoined: _agent_joined,
    f.NodeLost: _node_lost,
    f.GenerationBegan: _generation_began,
    f.Reported: _reported,
    f.DecisionMade: _decision_made,
    f.Concluded: _concluded,
    f.FailureSeen: _failure_seen,
    f.RestartSettled: _restart_settled,
    f.MemberLeft: _member_left,
    f.RanksDone: _ranks_done,
    f.DrainAsked: _drain_asked,
    f.RanksAsked: _ranks_asked,
    f.Finished: _finished,
}
