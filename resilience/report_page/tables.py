"""The parts of the page that are read: where time went, what was seen where, decisions, devices, drills, state loaded.

Long lists are summed up or cut, and say by how much: a page must open on a phone whatever the run was.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

from resilience.cli.output import duration
from resilience.report_page.gather import Device, Material
from resilience.report_page.judgement import Evidence, finding_of, is_checked, plural
from resilience.report_page.markup import Child, Element, h
from resilience.report_page.model import DecisionRow, DetectionRow, Report
from resilience.report_page.scales import clock, share
from resilience.report_page.symbols import RANKING, inline_symbol
from resilience.report_page.timeline import sign_of

__all__ = [
    "draw_badput",
    "draw_decisions",
    "draw_detections",
    "draw_devices",
    "draw_drill",
    "draw_evidence",
    "draw_state",
    "table",
]

_NUM_SHOWN = 20
"""Decisions and devices that are shown at once …"""
_NUM_FOLDED = 100
"""… and how many more can be unfolded."""
_MAX_SITES = 14
_MAX_KINDS = 8
_MAX_ROWS = 40
_CAUSES = {
    "init": "start-up",
    "recovery": "recovery: failure to next step",
    "lost_work": "steps taken again after a restart",
    "replay": "iterations replayed",
    "rewind": "rewinding in memory",
    "check": "waiting for checks",
    "checkpoint_save": "writing checkpoints",
    "checkpoint_load": "loading checkpoints",
    "snapshot": "copying snapshots",
    "other": "everything else: data, evaluation, waiting",
}
_TONES = {"good": "✓", "info": "i", "warn": "?", "bad": "✗"}


def table(columns: Sequence[str], rows: Iterable[Sequence[Child]], *, kind: str = "", label: str) -> Element:
    """A table that becomes a list of cards on a phone; columns that begin with `>` are aligned to the right."""
    heads = [column.removeprefix(">") for column in columns]
    classes = ["right" if column.startswith(">") else None for column in columns]
    body = [
        h("tr", [h("td", cell, class_=c, data_label=head) for cell, head, c in zip(cells, heads, classes, strict=True)])
        for cells in rows
    ]
    head = h("thead", h("tr", [h("th", text, class_=c, scope="col") for text, c in zip(heads, classes, strict=True)]))
    return h("table", h("caption", label, class_="unseen"), head, h("tbody", body), class_=f"cards {kind}".rstrip())


def draw_badput(report: Report, lifetime_s: float) -> Element | None:
    """Goodput as one bar, and below it each cause of badput with its share."""
    if report.goodput_ratio is None or lifetime_s <= 0:
        return None
    causes = sorted(((s, cause) for cause, s in report.badput_s.items() if s > 0), reverse=True)
    whole_s = lifetime_s
    kept_s = min(max(report.goodput_ratio, 0.0), 1.0) * whole_s
    if not causes and kept_s < whole_s:
        causes = [(whole_s - kept_s, "all else, by causes that are not told here")]
    rows = [_bar("steps that were kept", kept_s, whole_s, "good")]
    rows += [_bar(_CAUSES.get(cause, cause), seconds, whole_s, "lost") for seconds, cause in causes]
    return h("ul", rows, class_="bars", id="badput")


def _bar(label: str, seconds: float, whole_s: float, kind: str) -> Element:
    part = 100 * seconds / whole_s if whole_s > 0 else 0.0
    said = f"{label}: {duration(seconds)}, {share(seconds, whole_s)}"
    rect = h("rect", width=f"{max(part, 0.25):.4g}%", height="100%", rx="2", class_=f"bar {kind}")
    return h(
        "li",
        h("span", label, class_="bar-name"),
        h("span", f"{duration(seconds)} · {share(seconds, whole_s)}", class_="bar-value"),
        h("svg", rect, class_="bar-plot", role="img", aria_label=said),
    )


def draw_detections(detections: Sequence[DetectionRow]) -> Element:
    """How many alarms by site and kind, darker where there are more; then by what became of them."""
    counts = collections.Counter((d.site, d.kind) for d in detections)
    sites = _most_frequent((d.site for d in detections), _MAX_SITES)
    kinds = _most_frequent((d.kind for d in detections), _MAX_KINDS)
    most = max(counts.values(), default=1)
    rows: list[list[Child]] = []
    for site in sites:
        cells = [_cell(counts[site, kind], most) for kind in kinds]
        rows.append([site, *cells, f"{sum(n for (where, _), n in counts.items() if where == site):,}"])
    left_out = len({d.site for d in detections}) - len(sites) + len({d.kind for d in detections}) - len(kinds)
    heads = [h("th", text.replace("_", " "), scope="col") for text in ("site", *kinds, "all")]
    body = [h("tr", h("th", cells[0], scope="row"), [_as_cell(cell) for cell in cells[1:]]) for cells in rows]
    heat = h(
        "table",
        h("caption", "Alarms by site and kind", class_="unseen"),
        h("thead", h("tr", heads)),
        h("tbody", body),
        class_="heat",
    )
    more = f"{plural(left_out, 'rarer site or kind', 'rarer sites or kinds')} left out." if left_out else None
    return h("div", h("div", heat, class_="wide"), _fates(detections), h("p", more, class_="muted") if more else None)


def _most_frequent(words: Iterable[str], count: int) -> list[str]:
    return [word for word, _ in collections.Counter(words).most_common(count)]


def _cell(count: int, most: int) -> Element:
    if not count:
        return h("td", "·", class_="none")
    level = 1 + round(3 * math.log1p(count) / math.log1p(max(most, 1)))
    return h("td", f"{count:,}", class_=f"heat-{level}")


def _as_cell(cell: Child) -> Element:
    return cell if isinstance(cell, Element) else h("td", cell or "")


def _fates(detections: Sequence[DetectionRow]) -> Element:
    counts = collections.Counter(map(sign_of, detections))
    words = {
        "mended": "mended in place",
        "transient": "gone when run again",
        "persistent": "came again on the same device",
        "deterministic": "data or code, not a device",
        "false_positive": "false alarms",
        "pending": "without a verdict",
    }
    items = [
        h("li", inline_symbol(sign), h("b", f"{counts[sign]:,}"), f" {words.get(sign, sign)}")
        for sign in sorted(counts, key=lambda each: -counts[each])
    ]
    return h("ul", items, class_="legend")


def draw_decisions(decisions: Sequence[DecisionRow], since: float) -> Element:
    """What was decided and why, in the order of time; of very many the gravest and the newest."""
    ordered = sorted(decisions, key=lambda d: d.decided_at)
    places = sorted(range(len(ordered)), key=lambda i: (RANKING.get(ordered[i].action, -1), i), reverse=True)
    shown, folded = (
        [_decision(ordered[i], since) for i in sorted(chosen)]
        for chosen in (places[:_NUM_SHOWN], places[_NUM_SHOWN : _NUM_SHOWN + _NUM_FOLDED])
    )
    more = h("ol", folded, class_="decisions") if folded else None
    rest = len(ordered) - len(shown) - len(folded)
    told = "lighter or older ones"
    last = f"{rest:,} more are told by `resilience decisions`." if rest else None
    return h("div", h("ol", shown, class_="decisions"), _folded(more, len(folded), told), _muted(last))


def _folded(content: Element | None, count: int, what: str) -> Element | None:
    return None if content is None else h("details", h("summary", f"{count:,} {what}"), content)


def _muted(text: str | None) -> Element | None:
    return h("p", text, class_="muted") if text else None


def _decision(d: DecisionRow, since: float) -> Element:
    facts = [f"step {d.step:,}"]
    if d.attempt:
        facts.append(f"attempt {d.attempt + 1}")
    if d.latency_ms:
        facts.append(f"took {duration(d.latency_ms / 1000)}")
    if d.lost_s:
        facts.append(f"{duration(d.lost_s)} of work repeated")
    if d.origin == "rank":
        facts.append("on the rank's own word")
    when = clock(d.decided_at, since) if d.decided_at else ""
    head = h(
        "div",
        inline_symbol(d.action),
        h("b", d.action),
        h("span", d.outcome, class_=f"tag {d.outcome if d.outcome.isalpha() else ''}".rstrip()) if d.outcome else None,
        h("span", " · ".join(facts), class_="muted"),
        class_="decision-head",
    )
    name = h("code", d.decision_id) if d.decision_id else None
    foot = h("small", name, " ", when, class_="muted")
    return h("li", head, h("p", d.reason or "no reason was recorded"), foot, class_=f"decision act-{_word(d.action)}")


def _word(text: str) -> str:
    """`text` as part of the name of a class."""
    return text if text.isidentifier() else "unknown"


def draw_devices(detections: Sequence[DetectionRow], known: Mapping[str, Device]) -> Element | None:
    """Each device with what was seen on it; those to look at first."""
    devices = {name: dataclasses.replace(device, ranks=set(device.ranks)) for name, device in known.items()}
    for d in detections:
        if d.device:
            devices.setdefault(d.device, Device(d.device, d.node)).ranks.add(d.rank)
    if not devices:
        return None
    seen = collections.defaultdict[str, collections.Counter[str]](collections.Counter)
    for d in detections:
        seen[d.device][sign_of(d)] += 1

    def urgency(device: Device) -> tuple[bool, bool, int, int, str]:
        found = seen[device.device]
        return (not device.cordoned, not device.is_lost, -found["persistent"], -found.total(), device.device)

    ordered = sorted(devices.values(), key=urgency)
    most = max((counts.total() for counts in seen.values()), default=0)
    rows = [_device(device, seen[device.device], most) for device in ordered[: _NUM_SHOWN + _NUM_FOLDED]]
    columns = ["device", "node", ">ranks", "alarms", "state"]
    if any(device.num_faults_ever is not None for device in ordered):
        columns.insert(4, ">faults, all jobs")
        for row, device in zip(rows, ordered, strict=False):
            row.insert(4, "–" if device.num_faults_ever is None else f"{device.num_faults_ever:,}")
    rest = len(ordered) - len(rows)
    folded = rows[_NUM_SHOWN:]
    more = table(columns, folded, label="More devices", kind="devices") if folded else None
    last = f"{rest:,} more devices, with fewer alarms or none." if rest else None
    return h(
        "div",
        table(columns, rows[:_NUM_SHOWN], label="Devices", kind="devices"),
        _folded(more, len(folded), "devices with fewer alarms or none"),
        _muted(last),
    )


def _device(device: Device, seen: collections.Counter[str], most: int) -> list[Child]:
    total = seen.total()
    parts, at = [], 0.0
    for sign in sorted(seen, key=lambda each: -RANKING.get(each, -1)):
        width = 100 * seen[sign] / most
        parts.append(
            h(
                "rect",
                h("title", f"{seen[sign]:,} {sign}"),
                x=f"{at:.4g}%",
                width=f"{width:.4g}%",
                height="100%",
                class_=f"part-{_word(sign)}",
            )
        )
        at += width
    told = ", ".join(f"{count:,} {sign.replace('_', ' ')}" for sign, count in seen.most_common())
    picture = h("svg", parts, class_="device-plot", role="img", aria_label=told) if total else None
    if device.cordoned:
        state = h("span", "out of use", class_="tag bad")
    elif device.is_lost:
        state = h("span", "lost", class_="tag bad")
    else:
        state = h("span", "in use" if device.ranks else "spare", class_="tag")
    name = h("small", device.name, class_="muted") if device.name and device.name not in device.device else None
    ranks = ", ".join(map(str, sorted(device.ranks)[:8])) + (" …" if len(device.ranks) > 8 else "")
    reason = h("small", device.reason, class_="muted") if device.reason else None
    return [
        h("div", h("code", device.device), name),
        device.node,
        ranks,
        h("div", h("span", told or "none", class_=None if total else "muted"), picture, class_="device-alarms"),
        h("div", state, reason),
    ]


def draw_drill(report: Report) -> Element | None:
    """Each injected fault beside the alarm that it raised."""
    if not report.faults_injected:
        return None
    rows: list[list[Child]] = []
    for strike in report.faults_injected[:_MAX_ROWS]:
        found = finding_of(strike, report)
        place = f"{strike.site}[{strike.layer}]" if strike.layer >= 0 and strike.site != "process" else strike.site
        told: Child
        if found is not None:
            late = max(0.0, found.detected_at - strike.struck_at)
            told = h("span", h("b", "seen", class_="good"), f" by {found.check or 'a check'} after {duration(late)}")
        elif strike.no_effect:
            told = h("span", "no effect, nothing to see", class_="muted")
        elif not is_checked(strike):
            told = h("span", "met without an alarm", class_="muted")
        else:
            told = h("b", "not seen", class_="bad")
        rows.append([f"{strike.step:,}", f"{strike.rank}", place, strike.kind.replace("_", " "), told])
    rest = len(report.faults_injected) - len(rows)
    more = h("p", f"{rest:,} more.", class_="muted") if rest else None
    return h("div", table([">step", ">rank", "site", "kind", "found"], rows, label="Injected faults"), more)


def draw_state(report: Report, material: Material) -> Element | None:
    """Snapshots and checkpoints: how many, and where each generation began."""
    items: list[Element] = []
    for row in report.generations:
        if row.restore is not None:
            text = f"Generation {row.generation} began from {row.restore.reason or row.restore.tier}."
            items.append(h("li", inline_symbol("loaded"), text))
            items += [h("li", inline_symbol("refused"), f"Not taken: {line}") for line in row.restore.passed_over]
    kept = report.snapshots
    if kept is not None and kept.num_taken:
        steps = ", ".join(f"{tier} {step:,}" for tier, step in kept.newest_step.items())
        text = (
            f"{plural(kept.num_taken, 'memory snapshot')}, for which training waited {duration(kept.blocked_s)} in all"
        )
        clean = "" if kept.newest_clean_step is None else f"; step {kept.newest_clean_step:,} is the newest known clean"
        items.append(h("li", inline_symbol("published"), f"{text}. Newest steps: {steps or 'none'}{clean}."))
    for phase, (count, seconds) in sorted(material.snapshot_seconds.items()):
        if count:
            what = {"copy": "copied", "load": "loaded", "flush": "flushed to disk"}.get(phase, phase)
            mean = duration(seconds / count)
            text = f"Memory snapshots: {what} {plural(count, 'time')}, each rank's part counted, {mean} each."
            items.append(h("li", inline_symbol("published"), text))
    kinds = collections.Counter(point.kind for point in report.checkpoints)
    for kind in sorted(kinds, key=lambda each: RANKING.get(each, -1)):
        newest = max((c for c in report.checkpoints if c.kind == kind), key=lambda c: c.at)
        why = f": {newest.reason}" if newest.reason else ""
        what = "written" if kind == "published" else kind
        text = f"{plural(kinds[kind], 'checkpoint')} {what}, the newest {newest.tag or 'without a tag'}{why}"
        items.append(h("li", inline_symbol(kind), text))
    return h("ul", items[:_MAX_ROWS], class_="plain") if items else None


def draw_evidence(sentence: str, tone: str, grounds: Sequence[Evidence]) -> Element:
    """Whether the result is that of a fault-free run, with the grounds."""
    items = [
        h("li", h("span", _TONES[ground.tone], class_=f"badge {ground.tone}", aria_hidden="true"), ground.text)
        for ground in grounds
    ]
    proof = h(
        "p",
        "Proof, beyond the record: ",
        h("code", "resilience digest CHECKPOINT_DIR"),
        " gives the same SHA-256 for this run and for one without faults.",
        class_="muted",
    )
    answer = h("p", h("b", sentence), class_=f"answer {tone}")
    return h("div", answer, h("ul", items, class_="plain") if items else None, proof)
