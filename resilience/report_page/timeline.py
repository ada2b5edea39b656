"""The run over time: how far training had come, its generations, and below them what struck, was seen and was done."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Iterator, Mapping, Sequence

from resilience.cli.output import duration
from resilience.report_page import frames
from resilience.report_page.frames import Band, Event, Line
from resilience.report_page.gather import Material
from resilience.report_page.judgement import plural
from resilience.report_page.markup import Element, h
from resilience.report_page.model import DetectionRow, GenerationRow, Report
from resilience.report_page.scales import Scale, clock, number_ticks, time_ticks
from resilience.report_page.symbols import RANKING, inline_symbol

__all__ = ["alarm_event", "draw_timeline", "sign_of"]

_NUM_POINTS = 400
"""Places of the axis for each of which a curve is told by its first and its last point."""
_MEANINGS = {
    "injected": "struck",
    "no effect": "without effect",
    "mended": "mended in place",
    "transient": "gone when run again",
    "persistent": "came again on the device",
    "deterministic": "data or code",
    "false_positive": "false alarm",
    "pending": "no verdict",
    "continue": "go on",
    "corrected": "mended in place",
    "replay": "iteration replayed",
    "rewind": "rewound in memory",
    "restart": "restarted",
    "restore": "restored from a checkpoint",
    "quarantine": "device taken out of use",
    "stop": "run stopped",
    "published": "checkpoint written",
    "loaded": "state loaded",
    "doubted": "checkpoint doubted",
    "refused": "state refused",
}


def draw_timeline(report: Report, material: Material) -> Element | None:
    """The picture; None where no time is known."""
    lanes = _lanes(report)
    known = [event.at for events in lanes.values() for event in events]
    known += [at for row in report.generations for at in (row.began_at, row.first_step_at, row.ended_at) if at]
    known += [at for at in (report.started_at, report.finished_at) if at]
    if report.started_at and not report.finished_at and material.at > report.started_at:
        known.append(material.at)
    if len(known) < 2 or max(known) <= min(known):
        return None
    scale = Scale(min(known), max(known))
    faults = [event.at for name in ("Injected", "Alarms") for event in lanes.get(name, ())]
    stretches = list(_stretches(report.generations, scale))
    rows = [_progress(report, material, scale, faults, stretches)]
    if stretches:
        rows.append(frames.bands("Generations", stretches, scale))
    rows += [frames.lane(name, events, scale, lines=faults) for name, events in lanes.items() if events]
    rows.append(frames.axis(time_ticks(scale.low, scale.high, 7), scale))
    caption = "Each sign tells more when it is pointed at. Red lines are faults and alarms."
    return h("figure", rows, _legend(lanes), h("figcaption", caption), class_="picture", id="timeline")


def _lanes(report: Report) -> dict[str, list[Event]]:
    since = report.started_at
    struck = [
        Event(
            s.struck_at,
            "no effect" if s.no_effect else "injected",
            f"{clock(s.struck_at, since)}  step {s.step:,}: {s.kind} struck {_place(s.site, s.layer)} on rank {s.rank}",
        )
        for s in report.faults_injected
        if s.struck_at
    ]
    decided = [
        Event(d.decided_at, d.action, f"{clock(d.decided_at, since)}  step {d.step:,}: {d.action}: {d.reason}")
        for d in report.decisions
        if d.decided_at and d.outcome != "superseded"
    ]
    kept = [
        Event(c.at, c.kind, f"{clock(c.at, since)}  checkpoint {c.tag} {c.kind}{f': {c.reason}' if c.reason else ''}")
        for c in report.checkpoints
        if c.at
    ]
    for row in report.generations:
        if row.restore is not None and row.restore.tier != "disk" and row.began_at:
            text = f"{clock(row.began_at, since)}  generation {row.generation} begins from {row.restore.reason}"
            kept.append(Event(row.began_at, "loaded", text))
    alarms = [alarm_event(d, d.detected_at, since) for d in report.detections if d.detected_at]
    return {"Injected": struck, "Alarms": alarms, "Decisions": decided, "State": kept}


def alarm_event(detection: DetectionRow, at: float, since: float) -> Event:
    """A detection as an event at the place `at` of whatever axis."""
    d = detection
    when = f"{clock(d.detected_at, since)}  " if d.detected_at else ""
    text = f"{when}step {d.step:,}: {d.kind} in {_place(d.site, d.layer)} on rank {d.rank}"
    return Event(at, sign_of(d), f"{text}: {'mended in place' if d.mended else d.verdict.replace('_', ' ')}")


def sign_of(detection: DetectionRow) -> str:
    """The sign of an alarm: by whether it was mended, else by its verdict."""
    return "mended" if detection.mended and detection.verdict == "transient" else detection.verdict


def _place(site: str, layer: int) -> str:
    return f"{site}[{layer}]" if layer >= 0 else site


def _stretches(generations: Sequence[GenerationRow], scale: Scale) -> Iterator[Band]:
    """For each generation its start (the first) or recovery (the others), then its training."""
    since = scale.low
    for index, row in enumerate(generations):
        end = row.ended_at or scale.high
        first = row.first_step_at or end
        name, what = f"generation {row.generation}", "recovery" if index else "start"
        took = f"{what} {duration(max(first - since, 0))}"
        yield Band(since, first, what, f"{name}: {took}", took)
        if end > first:
            text = f"{name}: {duration(end - first)} of training on {row.world_size} ranks"
            ended = f"; ended: {row.ended_by}" if row.ended_by else ""
            yield Band(first, end, "training", text + ended, str(row.generation))
        since = end


def _progress(
    report: Report, material: Material, scale: Scale, faults: Iterable[float], stretches: Sequence[Band]
) -> Element:
    courses = _courses(report, material)
    top = max([report.num_steps, 1, *(step for course in courses for _, step in course)])
    points: list[tuple[float, float] | None] = []
    for course in courses:
        points += [*_thinned(course, scale), None]
    ticks = [(value, f"{value:,.0f}") for value in number_ticks(0, top, 4) if value == int(value)]
    behind = [band for band in stretches if band.kind != "training"]
    newest = courses[-1][-1][1] if courses else 0
    said = f"Steps taken over time: {newest:,.0f} at the end, in {plural(len(courses), 'course')}"
    return frames.panel(
        "Step",
        [Line(points, "line-progress")],
        scale,
        Scale(0, top * 1.04),
        ticks,
        said=said,
        lines=faults,
        behind=behind,
        note="over time",
    )


def _courses(report: Report, material: Material) -> list[list[tuple[float, float]]]:
    """(time, step) of each generation; where steps were not sampled, as far as other facts name step and time."""
    found = collections.defaultdict[int, list[tuple[float, float]]](list)
    for row in report.generations:
        origin = row.resumed_after if row.resumed_after is not None else row.restore.step if row.restore else None
        if row.first_step_at and (origin is not None or row.generation == 1):
            found[row.generation].append((row.first_step_at, origin or 0))
    if material.samples is not None:
        for at, generation, step in material.samples.progress:
            found[generation].append((at, step))
    else:
        for detection in report.detections:
            if detection.detected_at and detection.step:
                found[detection.generation].append((detection.detected_at, detection.step - 1))
        if report.finished_at and report.generations:
            last = report.generations[-1]
            found[last.generation].append((last.ended_at or report.finished_at, report.num_steps))
    return [sorted(found[generation], key=lambda point: point[0]) for generation in sorted(found)]


def _thinned(points: Sequence[tuple[float, float]], scale: Scale) -> list[tuple[float, float]]:
    """The first and the last point of each place, and every one from which the run went back."""
    places = [-1, *(round(scale.percent(at) / 100 * _NUM_POINTS) for at, _ in points), -1]
    return [
        point
        for point, before, here, after, following in zip(
            points, places, places[1:], places[2:], [*points[1:], points[-1]], strict=False
        )
        if here != before or here != after or following[1] < point[1]
    ]


def _legend(lanes: Mapping[str, Sequence[Event]]) -> Element:
    groups = {}
    for name, events in lanes.items():
        counts = collections.Counter(event.sign for event in events)
        signs = sorted(counts, key=lambda each: RANKING.get(each, -1))
        if signs:
            groups[name] = [(inline_symbol(sign), f"{_MEANINGS.get(sign, sign)} {counts[sign]:,}") for sign in signs]
    return frames.legend(groups)
