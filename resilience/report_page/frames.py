"""Pictures that fit any width: rows that share one horizontal axis in percent, so that text never shrinks with the
screen and no script is needed. A row is a lane of signs, a panel with lines, or the axis.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from resilience.report_page.markup import Child, Element, h
from resilience.report_page.scales import Scale
from resilience.report_page.symbols import RANKING, fill_of, symbol

__all__ = ["Band", "Event", "Line", "axis", "bands", "gather_marks", "lane", "legend", "panel", "row"]

_NUM_BINS = 50
"""Places of a lane; what meets in one is drawn once, with its number."""
_MAX_SIGNS = 24
"""Signs that can be told apart on a phone: where there are more, a lane shows how many events lie where."""
_MAX_LINES = 24
"""Faults that are marked through all rows; more would hide what is drawn there."""
_MAX_TOLD = 6
"""Events of one sign that its tooltip tells one by one."""
_GRID = 1000
"""Units of a panel's own coordinates, in both directions."""


@dataclasses.dataclass(frozen=True, slots=True)
class Event:
    """Something that happened at a place of the axis."""

    at: float
    sign: str
    text: str


@dataclasses.dataclass(frozen=True, slots=True)
class Mark:
    """Events that are drawn as one sign."""

    percent: float
    sign: str
    count: int
    text: str
    signs: Mapping[str, int]
    """How many events of each sign."""


@dataclasses.dataclass(frozen=True, slots=True)
class Band:
    """A stretch of the axis."""

    low: float
    high: float
    kind: str
    """Class of its colour."""
    text: str
    label: str = ""


Form = Literal["line", "sticks", "dots"]


@dataclasses.dataclass(frozen=True, slots=True)
class Line:
    """Points in the order in which they are joined; None ends a stroke."""

    points: Sequence[tuple[float, float] | None]
    kind: str
    """Class of its colour."""
    form: Form = "line"
    """Points are joined, stand on the ground as sticks, or are dots."""


def gather_marks(events: Iterable[Event], scale: Scale) -> list[Mark]:
    """One mark for all events that are too close to be told apart; the gravest of them gives it its sign and place."""
    bins = collections.defaultdict[int, list[Event]](list)
    for event in events:
        bins[round(scale.percent(event.at) / 100 * _NUM_BINS)].append(event)
    marks = []
    for _, found in sorted(bins.items()):
        gravest = max(found, key=lambda event: RANKING.get(event.sign, -1))
        texts = [event.text for event in found[:_MAX_TOLD]]
        if len(found) > _MAX_TOLD:
            texts.append(f"… and {len(found) - _MAX_TOLD:,} more")
        signs = collections.Counter(event.sign for event in found)
        marks.append(Mark(scale.percent(gravest.at), gravest.sign, len(found), "\n".join(texts), signs))
    return marks


def row(label: str, *content: Child, note: str = "", kind: str = "") -> Element:
    """One row of a picture, with its name beside it (above it on a phone)."""
    name = h("div", h("span", label), h("small", note) if note else None, class_="row-name")
    return h("div", name, h("div", content, class_="row-plot"), class_=f"row {kind}".rstrip())


def lane(label: str, events: Sequence[Event], scale: Scale, *, lines: Iterable[float] = ()) -> Element:
    """Signs along the axis; `data-count` of each says for how many events it stands.

    Args:
        label: the lane's name.
        events: what happened, oldest first.
        scale: of the shared axis.
        lines: places where a fault is marked through all rows.
    """
    marks = gather_marks(events, scale)
    most = max((mark.count for mark in marks), default=1)
    is_crowded = len(marks) > _MAX_SIGNS
    drawn = [_pile(mark, most) if is_crowded else _mark(mark) for mark in marks]
    signs = collections.Counter(event.sign for event in events)
    said = f"{label}: {', '.join(f'{count:,} {sign}' for sign, count in signs.most_common())}"
    picture = h(
        "svg",
        None if is_crowded else _ground(),
        _fault_lines(lines, scale),
        drawn,
        class_="lane crowded" if is_crowded else "lane",
        role="img",
        aria_label=said,
    )
    return row(label, picture, note=f"{len(events):,}")


def _ground() -> Element:
    return h("line", x1="0", x2="100%", y1="50%", y2="50%", class_="ground")


def _fault_lines(places: Iterable[float], scale: Scale) -> list[Element]:
    seen = sorted({round(scale.percent(place) * 2) / 2 for place in places})
    if len(seen) > _MAX_LINES:
        return []
    return [h("line", x1=f"{x:g}%", x2=f"{x:g}%", y1="0", y2="100%", class_="fault-line") for x in seen]


def _pile(mark: Mark, most: int) -> Element:
    """Many events in one place as a pile, the gravest at the bottom; a single one can still be seen."""
    parts, ground = [], 100.0
    for sign in sorted(mark.signs, key=lambda each: -RANKING.get(each, -1)):
        height = max(100 * mark.signs[sign] / most, 5.0)
        ground -= height
        fill = h("rect", y=f"{max(ground, 0):.4g}%", width="100%", height=f"{height:.4g}%", class_=fill_of(sign))
        parts.append(fill)
    place = round(mark.percent / 100 * _NUM_BINS) / _NUM_BINS * 100
    width = 100 / _NUM_BINS
    told = ", ".join(f"{count:,} {sign}" for sign, count in mark.signs.items())
    return h(
        "svg",
        h("title", f"{told}\n{mark.text}"),
        parts,
        x=f"{min(max(place - width / 2, 0), 100 - width):.4g}%",
        width=f"{0.84 * width:.4g}%",
        height="100%",
        class_="mark pile",
        data_count=str(mark.count),
        data_sign=mark.sign,
    )


def _mark(mark: Mark) -> Element:
    size = 1.0 if mark.count == 1 else 1.15 if mark.count < 10 else 1.3 if mark.count < 100 else 1.5
    number = h("text", f"{mark.count:,}", x="9", y="-5", class_="mark-count") if mark.count > 1 else None
    return h(
        "svg",
        h("title", mark.text),
        symbol(mark.sign, size),
        number,
        x=f"{mark.percent:.3g}%",
        y="50%",
        class_="mark",
        data_count=str(mark.count),
        data_sign=mark.sign,
    )


def bands(label: str, found: Sequence[Band], scale: Scale) -> Element:
    """Stretches of time, one after the other."""
    drawn = []
    for band in found:
        low, high = scale.percent(band.low), scale.percent(band.high)
        inner: list[Child] = [
            h("title", band.text),
            h("rect", width="100%", height="100%", rx="2", class_=f"band {band.kind}"),
        ]
        if band.label and high - low > 0.9 * len(band.label) + 2:
            inner.append(h("text", band.label, x="50%", y="50%", class_=f"band-label on-{band.kind}"))
        drawn.append(h("svg", inner, x=f"{low:.4g}%", width=f"{max(high - low, 0.15):.4g}%", y="5", height="18"))
    said = "; ".join(band.text for band in found[:12])
    return row(label, h("svg", drawn, class_="lane", role="img", aria_label=f"{label}: {said}"))


def panel(
    label: str,
    drawn: Sequence[Line],
    across: Scale,
    up: Scale,
    ticks: Sequence[tuple[float, str]],
    *,
    said: str,
    lines: Iterable[float] = (),
    behind: Iterable[Band] = (),
    note: str = "",
) -> Element:
    """Lines over the axis.

    Args:
        label: the panel's name.
        drawn: what is drawn, the hindmost first.
        across: scale of the shared axis.
        up: scale of the panel's own axis.
        ticks: values of the upward axis with their labels.
        said: the picture in words.
        lines: places where a fault is marked.
        behind: stretches that are shaded.
        note: a few words below the name.
    """
    shaded = []
    for band in behind:
        low, high = across.percent(band.low), across.percent(band.high)
        shade = h(
            "rect", x=f"{low:.4g}%", width=f"{high - low:.4g}%", y="0", height="100%", class_=f"shade {band.kind}"
        )
        shaded.append(shade)
    grid, labels = [], []
    for value, text in ticks:
        y = f"{100 - up.percent(value):.4g}%"
        grid.append(h("line", x1="0", x2="100%", y1=y, y2=y, class_="grid"))
        labels.append(h("text", text, x="2", y=y, dy="-3", class_="tick"))
    strokes = [h("path", d=_path(line, across, up), class_=f"stroke {line.kind}") for line in drawn]
    inner = h("svg", strokes, viewBox=f"0 0 {_GRID} {_GRID}", preserveAspectRatio="none", width="100%", height="100%")
    picture = h(
        "svg", shaded, grid, _fault_lines(lines, across), inner, labels, class_="panel", role="img", aria_label=said
    )
    return row(label, picture, note=note, kind="tall")


def _path(line: Line, across: Scale, up: Scale) -> str:
    words, is_down = [], False
    for point in line.points:
        if point is None:
            is_down = False
            continue
        x, y = across.percent(point[0]) * _GRID / 100, _GRID - up.percent(point[1]) * _GRID / 100
        if line.form == "sticks":
            words.append(f"M{x:.1f} {_GRID}V{y:.1f}")
        elif line.form == "dots":
            words.append(f"M{x:.1f} {y:.1f}h0")  # a stroke of no length with round ends
        else:
            words.append(f"{'L' if is_down else 'M'}{x:.1f} {y:.1f}")
            is_down = True
    return "".join(words)


def axis(ticks: Sequence[tuple[float, str]], scale: Scale, *, label: str = "") -> Element:
    """The values of the shared axis. On a phone every other one is left out."""
    drawn = []
    for index, (value, text) in enumerate(ticks):
        x = scale.percent(value)
        place = "start" if x < 4 else "end" if x > 96 else "middle"
        words = h("text", text, x=f"{x:.4g}%", y="14", class_=f"tick {place}")
        drawn.append(h("g", words, class_="minor" if index % 2 else "major"))
    return row(label, h("svg", drawn, class_="axis", aria_hidden="true"), kind="axis-row")


def legend(groups: Mapping[str, Iterable[tuple[Element, str]]]) -> Element:
    """Signs with what they mean, by lane."""
    rows = [
        (h("dt", lane), h("dd", [h("span", sign, text) for sign, text in entries])) for lane, entries in groups.items()
    ]
    return h("dl", [each for pair in rows for each in pair], class_="key")
