"""The run over its steps: the loss where it was sampled, the duration of every step, and the alarms above both."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from resilience.cli.output import duration, number
from resilience.report_page import frames
from resilience.report_page.frames import Line
from resilience.report_page.gather import Samples
from resilience.report_page.markup import Element, h
from resilience.report_page.model import Report
from resilience.report_page.scales import Scale, log_ticks, number_ticks
from resilience.report_page.timeline import alarm_event

__all__ = ["draw_curves"]

_NUM_BINS = 300
_NUM_DOTS = 60
_LOG_FROM = 20.0
"""Largest step ÷ median from which on durations are drawn over powers of ten."""

Sampled = tuple[int, int, float]
"""(generation, step, value)"""


def draw_curves(report: Report, samples: Samples | None) -> Element | None:
    """The picture; None where no step was sampled."""
    if samples is None or not samples.durations:
        return None
    newest = max(step for _, step, _ in samples.durations)
    scale = Scale(0.5, max(newest, 2) + 0.5)
    places = [d.step for d in report.detections if d.step]
    alarms = [alarm_event(d, d.step, report.started_at) for d in report.detections if d.step]
    rows = [frames.lane("Alarms", alarms, scale, lines=places)] if alarms else []
    losses = _losses(samples.losses, scale, places)
    if losses is not None:
        rows.append(losses)
    rows.append(_durations(samples.durations, scale, places))
    ticks = [(value, f"{value:,.0f}") for value in number_ticks(scale.low, scale.high, 7) if value == int(value)]
    rows.append(frames.axis(ticks, scale, label="step"))
    return h("figure", rows, h("figcaption", _caption(samples, losses is not None)), class_="picture", id="curves")


def _caption(samples: Samples, has_losses: bool) -> str:
    if not has_losses:
        return (
            "The loss is not drawn: the journal holds fewer than two readings of it. Shown is how long each step took."
        )
    again = " What was taken again is dashed." if any(_kept_and_again(_courses(samples.losses))[1]) else ""
    return (
        f"Loss of rank 0 as its heartbeats told it, {len(samples.losses):,} readings: one a second at most, on a GPU "
        f"every ten steps.{again}"
    )


def _courses(values: Sequence[Sampled]) -> list[list[tuple[int, float]]]:
    """Values in runs of growing steps: a restart or a rewind begins the next one."""
    courses: list[list[tuple[int, float]]] = []
    before = (-1, -1)
    for generation, step, value in values:
        if generation != before[0] or step <= before[1]:
            courses.append([])
        courses[-1].append((step, value))
        before = (generation, step)
    return courses


def _losses(losses: Sequence[Sampled], scale: Scale, places: Sequence[float]) -> Element | None:
    finite = [value for _, _, value in losses if math.isfinite(value)]
    if len(finite) < 2:
        return None
    kept, again = _kept_and_again(_courses(losses))
    low, high = min(finite), max(finite)
    room = 0.08 * (high - low) or max(abs(high) * 0.01, 1e-6)
    up = Scale(low - room, high + room)
    ticks = [(value, number(value, 3)) for value in number_ticks(up.low, up.high, 4)]
    said = (
        f"Loss from {number(finite[0], 4)} to {number(finite[-1], 4)}, between {number(low, 4)} and {number(high, 4)}"
    )
    lines = [Line(again, "line-again"), Line(kept, "line-loss")]
    if len(losses) <= _NUM_DOTS:
        lines.append(Line(kept, "dots", form="dots"))
    return frames.panel("Loss", lines, scale, up, ticks, said=said, lines=places, note=f"now {number(finite[-1], 4)}")


def _kept_and_again(
    courses: Sequence[Sequence[tuple[int, float]]],
) -> tuple[list[tuple[float, float] | None], list[tuple[float, float] | None]]:
    """Strokes of what stayed, and of what a later course took again."""
    kept: list[tuple[float, float] | None] = []
    again: list[tuple[float, float] | None] = []
    resumed = math.inf
    for course in reversed(courses):
        stays = [point for point in course if point[0] < resumed]
        kept = [*_binned(stays), None, *kept]
        again = [*_binned([point for point in course if point[0] >= resumed]), None, *again]
        resumed = min(resumed, course[0][0])
    return kept, again


def _binned(points: Sequence[tuple[int, float]]) -> list[tuple[float, float] | None]:
    """As many points as can be seen, each the mean of its neighbours; a value that is not finite ends the stroke."""
    size = max(1, math.ceil(len(points) / _NUM_BINS))
    found: list[tuple[float, float] | None] = []
    for start in range(0, len(points), size):
        part = points[start : start + size]
        values = [value for _, value in part if math.isfinite(value)]
        found.append((part[len(part) // 2][0], statistics.fmean(values)) if values else None)
    return found


def _durations(durations: Sequence[Sampled], scale: Scale, places: Sequence[float]) -> Element:
    """A stick for each step: its duration; for several in one place their median, and lightly the longest."""
    longest_of = dict[int, list[float]]()
    for _, step, seconds in durations:
        place = round(scale.percent(step) / 100 * _NUM_BINS)
        longest_of.setdefault(place, []).append(seconds)
    span = (scale.high - scale.low) / _NUM_BINS
    usual, longest = [], []
    for place, values in sorted(longest_of.items()):
        at = scale.low + place * span
        usual.append((at, statistics.median(values)))
        longest.append((at, max(values)))
    median, top = statistics.median(s for *_, s in durations), max(s for *_, s in durations)
    bottom = min(s for *_, s in durations)
    is_log = bottom > 0 and top / median > _LOG_FROM
    up = Scale(10 ** math.floor(math.log10(bottom)), top * 1.3, is_log=True) if is_log else Scale(0, (top or 1) * 1.08)
    ticks = log_ticks(up.low, up.high)[1:] if is_log else number_ticks(0, up.high, 4)[1:]
    kind = "sticks wide" if len(longest_of) <= 80 else "sticks"
    return frames.panel(
        "Step time",
        [Line(longest, f"{kind} longest", form="sticks"), Line(usual, f"{kind} usual", form="sticks")],
        scale,
        up,
        [(value, duration(value)) for value in ticks],
        said=f"Duration of {len(durations):,} steps: median {duration(median)}, longest {duration(top)}",
        lines=places,
        note=f"median {duration(median)}",
    )
