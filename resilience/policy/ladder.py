"""From evidence to a decision: find the row, fill in the record, say which cheaper rungs were ruled out. Pure."""

from __future__ import annotations

import dataclasses

from resilience.config import PolicyConfig
from resilience.events import Action, Decision, Evidence, Mode, Origin, Outcome, Verdict
from resilience.policy.case import Case
from resilience.policy.table import RULES, Rule, Settles

__all__ = ["Ruling", "decide", "decide_locally", "decision_id", "judge"]

_LOCAL = frozenset({Action.CONTINUE, Action.CORRECTED, Action.REPLAY, Action.REWIND})
"""What a rank may do on its own word."""

_HARMLESS = frozenset({Action.CONTINUE, Action.CORRECTED})
"""What shadow mode need not hold back."""


@dataclasses.dataclass(frozen=True, slots=True)
class Ruling:
    """A decision with the row that it came from."""

    decision: Decision
    rule: Rule
    considered: tuple[str, ...]
    """Cheaper rungs that were ruled out, each with its reason."""


def decision_id(evidence: Evidence) -> str:
    """What the decision about `evidence` is called. A step that is run again after a rewind is another question."""
    course = f"-w{evidence.num_rewinds}" if evidence.num_rewinds else ""
    return f"g{evidence.generation}-s{evidence.step}{course}-a{evidence.attempt}"


def judge(
    evidence: Evidence,
    limits: PolicyConfig,
    mode: Mode = Mode.ENFORCE,
    *,
    now: float,
    restarts_left: int | None = None,
    spares: tuple[str, ...] = (),
) -> Ruling:
    """Decide about one attempt of one step, and show the work.

    Args:
        evidence: what all ranks know.
        limits: the budgets.
        mode: in `shadow` the action is `continue` and the reason says what would have been done.
        now: seconds since the Unix epoch, for the record only; no row looks at it.
        restarts_left: what is left of the restart budget; None takes the whole budget.
        spares: nodes that wait and could take the places of those with a device that fails again and again.
    """
    assert mode is not Mode.OFF, "nothing is decided in mode off"
    left = limits.max_restarts if restarts_left is None else restarts_left
    case = Case(evidence, limits, left, spares)
    rule = next(rule for rule in RULES if rule.when(case))
    decision = Decision(
        decision_id=decision_id(evidence),
        generation=evidence.generation,
        step=evidence.step,
        attempt=evidence.attempt,
        action=rule.action,
        reason=rule.reason(case),
        verdicts=_verdicts(case, rule),
        evidence=tuple(d.detection_id for d in (*case.alarms, *case.mended, *case.propagated)),
        cordon=case.repeat_offenders if rule.cordons else (),
        exit_code=None if rule.exit_code is None else int(rule.exit_code),
        decided_at=now,
        rule=rule.name,
    )
    if mode is Mode.SHADOW:
        decision = _shadowed(decision)
    return Ruling(decision, rule, _considered(case, rule))


def decide(
    evidence: Evidence,
    limits: PolicyConfig,
    mode: Mode = Mode.ENFORCE,
    *,
    now: float,
    restarts_left: int | None = None,
    spares: tuple[str, ...] = (),
) -> Decision:
    """What to do about one attempt of one step: `judge` without the work shown."""
    return judge(evidence, limits, mode, now=now, restarts_left=restarts_left, spares=spares).decision


def decide_locally(evidence: Evidence, limits: PolicyConfig, mode: Mode = Mode.ENFORCE, *, now: float) -> Decision:
    """The same table on a rank's own word, while no coordinator answers.

    A rung that needs the coordinator becomes `continue`, and the reason says so.
    """
    decision = decide(evidence, limits, mode, now=now)
    local = dataclasses.replace(decision, origin=Origin.RANK, reason=f"no coordinator answered: {decision.reason}")
    if decision.action in _LOCAL:
        return local
    return dataclasses.replace(
        local,
        action=Action.CONTINUE,
        exit_code=None,
        cordon=(),
        reason=f"no coordinator answered, the step is taken; it would have been {decision.action}: {decision.reason}",
    )


def _verdicts(case: Case, rule: Rule) -> tuple[tuple[str, Verdict], ...]:
    settled = case.settle(Verdict.TRANSIENT, case.mended) + case.settle(Verdict.PROPAGATED, case.propagated)
    if rule.settles is Settles.ALARMS:
        settled += case.settle(rule.verdict, case.alarms)
        settled += case.settle(rule.verdict, case.evidence.previous)
    elif rule.settles is Settles.PREVIOUS:
        settled += case.settle(rule.verdict, case.evidence.previous)
    return settled


def _shadowed(decision: Decision) -> Decision:
    if decision.action in _HARMLESS:
        return decision
    return dataclasses.replace(
        decision,
        action=Action.CONTINUE,
        outcome=Outcome.SHADOWED,
        exit_code=None,
        cordon=(),
        reason=f"shadow mode, nothing was done; it would have been {decision.action}: {decision.reason}",
    )


def _considered(case: Case, rule: Rule) -> tuple[str, ...]:
    """Why each rung cheaper than the chosen one does not serve."""
    if not case.alarms:
        return ()
    order = list(Action)
    reasons = {
        Action.CORRECTED: "correct in place: no undamaged copy is left"
        if case.state_is_damaged
        else "correct in place: the operation could not be mended, or has no inputs left to run again",
        Action.REPLAY: _why_no_replay(case),
        Action.REWIND: _why_no_rewind(case),
        Action.RESTART: f"restart: the budget of {case.limits.max_restarts} restarts is used up"
        if not case.may_restart
        else "restart: a device that computes wrongly would be used again",
    }
    if rule.action is Action.CONTINUE:
        return ()
    return tuple(text for action, text in reasons.items() if order.index(action) < order.index(rule.action))


def _why_no_rewind(case: Case) -> str:
    if not (case.state_is_damaged or case.loss_spiked):
        return "rewind: nothing wrong was committed, the same step would be run again"
    return f"rewind: {case.evidence.rewind_reason or 'no memory snapshot is kept'}"


def _why_no_replay(case: Case) -> str:
    if case.state_is_damaged:
        return "replay: it would start from the same damaged state"
    if not case.evidence.replay_available:
        return f"replay: off, {case.evidence.replay_reason or 'no reason given'}"
    return f"replay: {case.evidence.attempt} of at most {case.limits.max_replays_per_step} were tried"
