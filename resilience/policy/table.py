"""The policy as data: what is done about one attempt of one step. The first row that applies wins.

Everything that explains a decision (`resilience explain`, `resilience policy show`, docs/policy.md) is drawn from these
rows, so there is nothing beside them that could drift. A row must never look at the clock or at anything but its case.

Why an arithmetic check that fails again is replayed up to the whole budget before its device is blamed: a replay costs
one iteration, a wrongly cordoned device costs the job its place in the queue.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable

from resilience.errors import ExitCode
from resilience.events import Action, Verdict
from resilience.policy.case import Case, describe

__all__ = ["RULES", "Rule", "Settles", "as_markdown"]


class Settles(enum.StrEnum):
    """Which detections a row gives its verdict to."""

    NONE = "none"
    ALARMS = "alarms"
    PREVIOUS = "previous"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One row."""

    name: str
    text: str
    """The condition and what follows from it, for people."""
    when: Callable[[Case], bool]
    action: Action
    reason: Callable[[Case], str]
    """The sentence that the decision carries."""
    verdict: Verdict = Verdict.PENDING
    settles: Settles = Settles.NONE
    exit_code: ExitCode | None = None
    hands_to_skip: bool = False
    """DeepSpeed will skip the step for its non-finite gradients."""
    cordons: bool = False
    """The repeat offenders are taken out of use."""


def _step(case: Case) -> str:
    return f"step {case.evidence.step}"


def _replays(case: Case) -> str:
    count = case.evidence.attempt
    return "1 replay" if count == 1 else f"{count} replays"


def _unavailable(case: Case) -> str:
    if case.state_is_damaged:
        return "a replay would start from the same damaged state"
    if not case.evidence.replay_available:
        return f"replay is off ({case.evidence.replay_reason or 'no reason given'})"
    return f"{_replays(case)} of {_step(case)} did not help"


def _no_way_on(case: Case) -> str:
    if case.spares:
        return f"a spare node waits, but the budget of {case.limits.max_restarts} restarts is used up"
    return "no spare device is left in this run"


def _rewind(case: Case) -> str:
    evidence = case.evidence
    first = (evidence.rewind_step or 0) + 1
    steps = f"step {first} is" if first == evidence.step else f"steps {first} to {evidence.step} are"
    return f"the memory snapshot of step {evidence.rewind_step} is loaded and {steps} run again"


def _no_rewind(case: Case) -> str:
    return f"no rewind ({case.evidence.rewind_reason or 'no memory snapshot is kept'})"


RULES: tuple[Rule, ...] = (
    Rule(
        name="ordered-rewind",
        text="an operator asks for a rewind, and there is a snapshot to go back to: load it, run the steps since again",
        when=lambda c: c.is_ordered and c.may_rewind,
        action=Action.REWIND,
        reason=lambda c: f"an operator ordered a rewind: {_rewind(c)}",
    ),
    Rule(
        name="order-refused",
        text="an operator asks for a rewind that cannot be done, and nothing else is wrong: take the step",
        when=lambda c: c.is_ordered and not c.alarms and c.is_first_attempt,
        action=Action.CONTINUE,
        reason=lambda c: f"an operator ordered a rewind: {_no_rewind(c)}; training goes on",
    ),
    Rule(
        name="clean",
        text="nothing was detected: take the step",
        when=lambda c: not c.alarms and not c.mended and c.is_first_attempt,
        action=Action.CONTINUE,
        reason=lambda c: f"nothing was detected in {_step(c)}",
    ),
    Rule(
        name="mended",
        text="every alarm was mended in place and verified again: take the step",
        when=lambda c: not c.alarms and c.is_first_attempt,
        action=Action.CORRECTED,
        verdict=Verdict.TRANSIENT,
        reason=lambda c: f"{describe(c.mended)} was mended in place and verified again",
    ),
    Rule(
        name="rewound-clean",
        text="the snapshot was loaded, the steps since were run again, and no alarm is left: take the step",
        when=lambda c: not c.alarms and c.evidence.rewound_to is not None,
        action=Action.CONTINUE,
        verdict=Verdict.TRANSIENT,
        settles=Settles.PREVIOUS,
        reason=lambda c: (
            f"after the rewind to step {c.evidence.rewound_to} no alarm is left in {_step(c)}: no step is lost"
        ),
    ),
    Rule(
        name="replayed-clean",
        text="the replay raised no alarm that was not mended: the fault was transient, take the step",
        when=lambda c: not c.alarms,
        action=Action.CONTINUE,
        verdict=Verdict.TRANSIENT,
        settles=Settles.PREVIOUS,
        reason=lambda c: f"{_replays(c)} of {_step(c)} cleared the alarm: the fault was transient",
    ),
    Rule(
        name="rewind",
        text=(
            "weights or optimizer state are wrong and cannot be rebuilt, and there is a memory snapshot from before:"
            " load it, run the steps since again"
        ),
        when=lambda c: c.state_is_damaged and c.may_rewind,
        action=Action.REWIND,
        reason=lambda c: f"{describe(c.alarms)}: nothing is left to rebuild it from; {_rewind(c)}",
    ),
    Rule(
        name="state-damaged",
        text=(
            "weights or optimizer state are wrong and cannot be rebuilt, and no rewind is possible: no replay can help;"
            " new generation from the newest snapshot or checkpoint that can be trusted"
        ),
        when=lambda c: c.state_is_damaged and c.may_restart,
        action=Action.RESTART,
        reason=lambda c: (
            f"{describe(c.alarms)}: nothing is left to rebuild it from, {_unavailable(c)}, and {_no_rewind(c)}:"
            " restart from the newest snapshot or checkpoint that can be trusted"
        ),
    ),
    Rule(
        name="loss-rewind",
        text="a loss far above those before it, the same on replay, and a clean snapshot from before: go back to it",
        when=lambda c: c.loss_spiked_again and c.may_rewind,
        action=Action.REWIND,
        reason=lambda c: f"{describe(c.alarms)}, which no replay clears; {_rewind(c)}",
    ),
    Rule(
        name="loss-spike",
        text="a loss far above those before it, which neither replay nor rewind clears: the data, take the step",
        when=lambda c: c.loss_spiked_again,
        action=Action.CONTINUE,
        verdict=Verdict.FALSE_POSITIVE,
        settles=Settles.ALARMS,
        reason=lambda c: f"{describe(c.alarms)}, and {_no_rewind(c)}: left as it is, losses of healthy runs do spike",
    ),
    Rule(
        name="scale-search",
        text="gradients overflow while the fp16 loss scaler searches: that is its business, DeepSpeed skips the step",
        when=lambda c: c.is_scale_search,
        action=Action.CONTINUE,
        verdict=Verdict.DETERMINISTIC,
        settles=Settles.ALARMS,
        hands_to_skip=True,
        reason=lambda c: f"non-finite gradients in {_step(c)} while the loss scaler searches: left to DeepSpeed",
    ),
    Rule(
        name="data-skips-exhausted",
        text="non-finite again on replay in a reproducible run, after too many skipped steps in a row: data or code",
        when=lambda c: c.is_deterministic and c.any_non_finite and c.skips_exhausted,
        action=Action.STOP,
        verdict=Verdict.DETERMINISTIC,
        settles=Settles.ALARMS,
        exit_code=ExitCode.DO_NOT_REQUEUE,
        reason=lambda c: (
            f"{describe(c.alarms)} came again on replay, and {c.evidence.consecutive_skips} steps in a row were skipped"
            f" (limit {c.limits.max_skips_in_a_row}): the data or the code is at fault"
        ),
    ),
    Rule(
        name="data-non-finite",
        text="non-finite at the same address on replay in a reproducible run: not hardware, DeepSpeed skips the step",
        when=lambda c: c.is_deterministic and c.any_non_finite,
        action=Action.CONTINUE,
        verdict=Verdict.DETERMINISTIC,
        settles=Settles.ALARMS,
        hands_to_skip=True,
        reason=lambda c: (
            f"{describe(c.alarms)} came again on replay in a reproducible run: not hardware, left to DeepSpeed's skip"
        ),
    ),
    Rule(
        name="data-finite",
        text="finite, at the same address on replay in a reproducible run: a false positive, take the step",
        when=lambda c: c.is_deterministic,
        action=Action.CONTINUE,
        verdict=Verdict.FALSE_POSITIVE,
        settles=Settles.ALARMS,
        reason=lambda c: (
            f"{describe(c.alarms)} came again on replay in a reproducible run and is finite: false positive"
        ),
    ),
    Rule(
        name="replay",
        text="an alarm could not be mended, and the step's budget of replays is not used up: run the iteration again",
        when=lambda c: c.may_replay,
        action=Action.REPLAY,
        reason=lambda c: (
            f"{describe(c.alarms)} was not mended in place; the gradients of {_step(c)} are discarded and it is"
            f" run again (replay {c.evidence.attempt + 1} of at most {c.limits.max_replays_per_step})"
        ),
    ),
    Rule(
        name="persistent-spare",
        text=(
            "a check of arithmetic failed again on the same device through all replays, restarts are left, and a spare"
            " node waits: cordon it, new generation with that one"
        ),
        when=lambda c: bool(c.repeat_offenders) and not c.is_first_attempt and bool(c.spares) and c.may_restart,
        action=Action.RESTART,
        verdict=Verdict.PERSISTENT,
        settles=Settles.ALARMS,
        cordons=True,
        reason=lambda c: (
            f"{describe(c.alarms)} came again through {_replays(c)}: a persistent fault."
            f" {', '.join(c.repeat_offenders)} computes wrongly and is cordoned; {', '.join(c.spares)}, a spare node,"
            " takes the place of its node: restart"
        ),
    ),
    Rule(
        name="persistent",
        text="a check of arithmetic failed again on the same device through all replays: cordon it, stop, requeue",
        when=lambda c: bool(c.repeat_offenders) and not c.is_first_attempt,
        action=Action.STOP,
        verdict=Verdict.PERSISTENT,
        settles=Settles.ALARMS,
        exit_code=ExitCode.REQUEUE,
        cordons=True,
        reason=lambda c: (
            f"{describe(c.alarms)} came again through {_replays(c)}: a persistent fault."
            f" {', '.join(c.repeat_offenders)} computes wrongly and is cordoned; {_no_way_on(c)}, requeue it elsewhere"
        ),
    ),
    Rule(
        name="skips-exhausted",
        text="non-finite through all replays, not measured to be reproducible, too many skips in a row: data or code",
        when=lambda c: c.only_screens and c.same_address and c.any_non_finite and c.skips_exhausted,
        action=Action.STOP,
        verdict=Verdict.DETERMINISTIC,
        settles=Settles.ALARMS,
        exit_code=ExitCode.DO_NOT_REQUEUE,
        reason=lambda c: (
            f"{describe(c.alarms)} came again through {_replays(c)}, and {c.evidence.consecutive_skips} steps in a row"
            f" were skipped (limit {c.limits.max_skips_in_a_row}); the run was not measured to be reproducible, but"
            " the data or the code is most likely at fault"
        ),
    ),
    Rule(
        name="unmeasured-non-finite",
        text="non-finite at the same address through all replays, not measured reproducible: DeepSpeed skips the step",
        when=lambda c: c.only_screens and c.same_address and c.any_non_finite,
        action=Action.CONTINUE,
        verdict=Verdict.DETERMINISTIC,
        settles=Settles.ALARMS,
        hands_to_skip=True,
        reason=lambda c: (
            f"{describe(c.alarms)} came again through {_replays(c)}; the run was not measured to be reproducible,"
            " so hardware is not excluded, but a skipped step does no harm: left to DeepSpeed's skip"
        ),
    ),
    Rule(
        name="unmeasured-finite",
        text="finite at the same address through all replays, not measured to be reproducible: a false positive",
        when=lambda c: c.only_screens and c.same_address,
        action=Action.CONTINUE,
        verdict=Verdict.FALSE_POSITIVE,
        settles=Settles.ALARMS,
        reason=lambda c: (
            f"{describe(c.alarms)} came again through {_replays(c)} at the same address and is finite; the run was not"
            " measured to be reproducible, but a fault that moves would not repeat so: false positive"
        ),
    ),
    Rule(
        name="restart",
        text=(
            "no replay can help and restarts are left: new generation from the newest snapshot or checkpoint that can"
            " be trusted"
        ),
        when=lambda c: c.may_restart,
        action=Action.RESTART,
        reason=lambda c: (
            f"{describe(c.alarms)}, and {_unavailable(c)}: restart from the newest snapshot or checkpoint that can be"
            " trusted"
        ),
    ),
    Rule(
        name="nothing-left",
        text="no replay can help and the restart budget is used up: stop, requeue",
        when=lambda c: True,
        action=Action.STOP,
        exit_code=ExitCode.REQUEUE,
        reason=lambda c: (
            f"{describe(c.alarms)}, and {_unavailable(c)}; the budget of {c.limits.max_restarts} restarts is used up"
        ),
    ),
)


def as_markdown() -> str:
    """Both tables as Markdown, in the order in which their rows are tried."""
    from resilience.policy.failures import EXIT_RULES

    lines = ["### One attempt of one step", "", "| # | rule | when, and what is done | action | verdict | exit |"]
    lines.append("|---|---|---|---|---|---|")
    for index, rule in enumerate(RULES, start=1):
        verdict = "–" if rule.verdict is Verdict.PENDING else str(rule.verdict)
        lines.append(
            f"| {index} | `{rule.name}` | {rule.text} | {rule.action} | {verdict} | {_exit_cell(rule.exit_code)} |"
        )
    lines += ["", "### A failure of processes", "", "| # | rule | when, and what is done | action | exit |"]
    lines.append("|---|---|---|---|---|")
    for index, exit_rule in enumerate(EXIT_RULES, start=1):
        cell = "the rank's" if exit_rule.passes_code else _exit_cell(exit_rule.exit_code)
        lines.append(f"| {index} | `{exit_rule.name}` | {exit_rule.text} | {exit_rule.action} | {cell} |")
    return "\n".join(lines) + "\n"


def _exit_cell(code: ExitCode | None) -> str:
    return "–" if code is None else str(int(code))
