"""What the page says in words: how the run stands, what to do, and how far its result is known to be bit-identical to a
fault-free one. Pure; every sentence rests on rows of the report.
"""

from __future__ import annotations

import collections
import dataclasses
import enum
from collections.abc import Iterator, Sequence

from resilience.cli.output import duration
from resilience.report_page.gather import Material, Samples
from resilience.report_page.model import DecisionRow, DetectionRow, Report, StrikeRow

__all__ = [
    "Evidence",
    "Headline",
    "Tone",
    "actions_of",
    "evidence",
    "finding_of",
    "headline",
    "is_checked",
    "is_repair",
    "plural",
]

_REPAIRS = ("corrected", "replay", "rewind", "restart", "restore")
_ALL = ("continue", *_REPAIRS, "quarantine", "stop")


class Tone(enum.StrEnum):
    """How good a piece of news is."""

    GOOD = "good"
    INFO = "info"
    WARN = "warn"
    BAD = "bad"


@dataclasses.dataclass(frozen=True, slots=True)
class Headline:
    """The first thing that is read."""

    tone: Tone
    state: str
    """One or two words."""
    story: tuple[str, ...]
    """What happened, in sentences."""
    advice: tuple[str, ...]
    """What to do, most urgent first."""


@dataclasses.dataclass(frozen=True, slots=True)
class Evidence:
    """One ground for or against."""

    tone: Tone
    text: str


def plural(count: int, one: str, many: str = "") -> str:
    """`count` with its noun."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def is_repair(decision: DecisionRow) -> bool:
    """Whether something was mended, repeated or begun again."""
    return decision.action in _REPAIRS and decision.outcome not in ("superseded", "shadowed")


def actions_of(report: Report) -> dict[str, int]:
    """How often each rung was chosen, cheapest first; a rung that this program does not know comes last."""
    counts = collections.Counter(d.action for d in report.decisions if d.outcome != "superseded")
    order = {action: place for place, action in enumerate(_ALL)}
    return dict(sorted(counts.items(), key=lambda item: order.get(item[0], len(order))))


def headline(report: Report, material: Material) -> Headline:
    """How the run stands."""
    tone, state = _state(report, material)
    advice = list(_pull(report, material))
    lost = sorted({device.node for device in material.devices.values() if device.is_lost})
    advice += [f"Look at node {node}: its agent was given up." for node in lost]
    if report.exit_code == 75:
        advice.append("Requeue the job: it left with 75.")
    elif report.exit_code == 93:
        advice.append("Do not requeue the job: it left with 93, the same failure would come again.")
    if tone is Tone.GOOD and advice:
        tone = Tone.WARN
    return Headline(tone, state, tuple(_story(report)), tuple(advice))


def _pull(report: Report, material: Material) -> Iterator[str]:
    """Devices that this run took out of use; what earlier jobs or a person did is no news."""
    blamed = {name: d.reason for d in report.decisions if d.outcome != "shadowed" for name in d.cordon}
    for name, reason in blamed.items():
        device = material.devices.get(name)
        if device is None or device.cordoned:
            where = f" (node {device.node})" if device is not None and device.node else ""
            why = device.reason if device is not None else reason
            yield f"Pull {name}{where}: {why or 'it was taken out of use'}."


def _state(report: Report, material: Material) -> tuple[Tone, str]:
    if report.exit_code == 0:
        return Tone.GOOD, "Finished"
    if report.exit_code == 75:
        return Tone.WARN, "Interrupted" if report.outcome == "interrupted" else "Stopped, requeue"
    if report.exit_code == 93:
        return Tone.BAD, "Stopped, do not requeue"
    if report.exit_code is not None:
        return Tone.BAD, f"Failed with exit code {report.exit_code}"
    if material.is_live:
        return Tone.INFO, "Running"
    return Tone.WARN, "Ended without a word"


def _story(report: Report) -> Iterator[str]:
    alarms = report.detections
    if not alarms:
        yield "No alarm was raised."
    else:
        mended = sum(d.mended for d in alarms)
        yield f"{plural(len(alarms), 'alarm')}{f', {mended:,} mended in place' if mended else ''}."
    counts = actions_of(report)
    done = [
        (counts.get("replay", 0), "iteration replayed", "iterations replayed"),
        (counts.get("rewind", 0), "rewind", "rewinds"),
        # Where spare nodes step in, one restart takes several decisions.
        (max(0, len(report.generations) - 1), "restart", "restarts"),
    ]
    told = [plural(*each) for each in done if each[0]]
    lost_s = sum(d.lost_s for d in report.decisions)
    if told:
        yield f"{_joined(told)}{f', {duration(lost_s)} of work repeated or lost' if lost_s else ''}."
    recovery_s = report.badput_s.get("recovery", 0.0)
    if recovery_s and len(report.generations) > 1:
        yield f"Getting back to training took {duration(recovery_s)}."
    if len(report.generations) > 1 and report.snapshots is not None and report.snapshots.num_steps_lost is not None:
        yield f"{plural(report.snapshots.num_steps_lost, 'step was', 'steps were')} taken again."
    if report.exit_code != 0 and report.reason:
        yield f"It ended because {report.reason}."


def _joined(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def evidence(report: Report, samples: Samples | None) -> tuple[Tone, str, list[Evidence]]:
    """How far the result is known to be that of a fault-free run: the tone, one sentence, the grounds."""
    grounds = [
        *_determinism(report),
        *_in_place(report.detections),
        *_repeated(report),
        *_generations(report),
        *_left_alone(report),
        *_unseen(report),
        *_seen_twice(samples),
    ]
    tones = {ground.tone for ground in grounds}
    is_repaired = any(map(is_repair, report.decisions))
    if Tone.BAD in tones:
        return Tone.BAD, "Something speaks against it.", grounds
    if Tone.WARN in tones:
        return Tone.WARN, "It cannot be told from the record.", grounds
    if not is_repaired:
        return Tone.GOOD, "Nothing was repaired, so nothing was changed.", grounds
    return Tone.GOOD, "Yes, by the record: every repair ran the same computation on the same bits again.", grounds


def _determinism(report: Report) -> Iterator[Evidence]:
    if report.deterministic:
        yield Evidence(Tone.GOOD, "Measured on this run: one iteration, run twice, gave the same bits on every rank.")
    elif report.deterministic is False:
        yield Evidence(Tone.BAD, "Measured on this run: one iteration, run twice, gave different bits.")
    elif any(map(is_repair, report.decisions)):
        yield Evidence(Tone.WARN, "Whether an iteration gives the same bits when it is run again was not measured.")


def _in_place(detections: Sequence[DetectionRow]) -> Iterator[Evidence]:
    mended = [d for d in detections if d.mended]
    rebuilt = sum(not d.bit_exact for d in mended)
    if len(mended) > rebuilt:
        count = plural(len(mended) - rebuilt, "alarm was", "alarms were")
        yield Evidence(Tone.GOOD, f"{count} mended by making the same call again: exact to the bit.")
    if rebuilt:
        count = plural(rebuilt, "result was", "results were")
        yield Evidence(Tone.BAD, f"{count} rebuilt from checksums: right within round-off, not to the bit.")


def _repeated(report: Report) -> Iterator[Evidence]:
    done = [d for d in report.decisions if d.action in ("replay", "rewind") and d.outcome == "succeeded"]
    if done:
        count = plural(len(done), "iteration was", "iterations were")
        text = f"{count} run again from recorded inputs and random states, and came out clean."
        yield Evidence(Tone.GOOD, text)


def _generations(report: Report) -> Iterator[Evidence]:
    for before, after in zip(report.generations, report.generations[1:], strict=False):
        if before.world_size and after.world_size and before.world_size != after.world_size:
            text = f"Generation {after.generation} had {after.world_size} ranks instead of {before.world_size}: "
            yield Evidence(Tone.BAD, text + "sums are taken in another order.")
    origins = [(row.generation, row.restore) for row in report.generations if row.restore is not None]
    for tiers, what in ((("memory", "peer"), "a memory snapshot"), (("disk",), "a checkpoint")):
        found = [(number, origin) for number, origin in origins if origin.tier in tiers and origin.step]
        if found:
            who = f"Generation {found[0][0]}" if len(found) == 1 else plural(len(found), "generation")
            steps = _joined([f"{origin.step:,}" for _, origin in found[:8]])
            where = f"step {steps}" if len(found) == 1 else f"steps {steps}{' …' if len(found) > 8 else ''}"
            yield Evidence(Tone.GOOD, f"{who} began from {what} of {where}, verified before it was used.")


def _left_alone(report: Report) -> Iterator[Evidence]:
    shadowed = sum(d.outcome == "shadowed" for d in report.decisions)
    if shadowed:
        text = (
            f"{plural(shadowed, 'decision was', 'decisions were')} only noted (mode {report.mode}), nothing was done."
        )
        yield Evidence(Tone.BAD, text)
    pending = sum(d.verdict == "pending" and not d.mended for d in report.detections)
    if pending:
        yield Evidence(Tone.WARN, f"{plural(pending, 'alarm has', 'alarms have')} no verdict.")
    same = sum(d.verdict == "deterministic" for d in report.detections)
    if same:
        count = plural(same, "alarm", "alarms")
        text = (
            f"{count} came again bit for bit: the data's or the code's doing, which a run without checks has as well."
        )
        yield Evidence(Tone.INFO, text)


def _unseen(report: Report) -> Iterator[Evidence]:
    unseen = [s for s in report.faults_injected if is_checked(s) and finding_of(s, report) is None]
    if unseen:
        text = f"{plural(len(unseen), 'injected fault', 'injected faults')} struck and no check told of it."
        yield Evidence(Tone.WARN, text)


def _seen_twice(samples: Samples | None) -> Iterator[Evidence]:
    """Losses that were sampled at the same step in two courses: of before and after a restart."""
    first: dict[int, tuple[int, float]] = {}
    equal, different = 0, []
    for generation, step, loss in samples.losses if samples is not None else ():
        known = first.setdefault(step, (generation, loss))
        if known[0] != generation:
            equal += known[1] == loss
            different += [step] if known[1] != loss else []
    if equal:
        text = f"{plural(equal, 'loss was', 'losses were')} sampled before and after a restart: equal to the last bit."
        yield Evidence(Tone.GOOD, text)
    if different:
        text = f"The loss of step {different[0]:,} was sampled before and after a restart, and was not the same."
        yield Evidence(Tone.WARN, text)


def is_checked(strike: StrikeRow) -> bool:
    """Whether an alarm is expected: lost nodes, dead coordinators and damaged files are met without one."""
    return not strike.no_effect and strike.site not in ("node", "coordinator", "storage")


def finding_of(strike: StrikeRow, report: Report) -> DetectionRow | None:
    """The alarm that an injected fault raised: the first one at its step, on its rank where there is one.

    What is wrong in the state between two steps is seen when it is looked at next.
    """
    is_of_state = strike.site in ("weight", "optimizer")
    found = [
        d
        for d in report.detections
        if d.detected_at >= strike.struck_at - 1.0
        and (d.step == strike.step or (is_of_state and d.site == strike.site and d.step > strike.step))
    ]
    return min(found, key=lambda d: (d.step, d.rank != strike.rank, d.detected_at), default=None)
