"""The whole page: its head, its parts in the order in which a person on call asks, its foot."""

from __future__ import annotations

import importlib.resources
from collections.abc import Iterator

from resilience.cli.output import duration
from resilience.coordinator.report import SCHEMA_VERSION
from resilience.report_page import judgement, tables
from resilience.report_page.curves import draw_curves
from resilience.report_page.gather import Material
from resilience.report_page.markup import Child, Element, h, write_document
from resilience.report_page.model import Report, read_report
from resilience.report_page.scales import moment, share
from resilience.report_page.timeline import draw_timeline

__all__ = ["draw_page"]

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
"""Whatever might ever slip into the page: a browser fetches nothing for it and runs nothing of it."""
_ICON = (
    "data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'%3E"
    "%3Cpath d='M1 9h3l2-6 4 11 2-5h3' fill='none' stroke='%230a66c2' stroke-width='2'/%3E%3C/svg%3E"
)


def draw_page(material: Material) -> str:
    """The page as HTML, complete in itself."""
    report, num_unread = read_report(material.report)
    head = judgement.headline(report, material)
    title = f"{head.state}: run {report.run_id}"
    body = h(
        "body",
        h("a", "Skip to the pictures", href="#what-happened", class_="skip"),
        h("header", _title(report, material, head), _tiles(report, material)),
        h("main", _parts(report, material)),
        _foot(report, material, num_unread),
    )
    return write_document(h("html", _head(title), body, lang="en"))


def _head(title: str) -> Element:
    style = importlib.resources.files("resilience.report_page").joinpath("page.css").read_text(encoding="utf-8")
    return h(
        "head",
        h("meta", charset="utf-8"),
        h("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        h("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        h("meta", name_="color-scheme", content="light dark"),
        h("meta", name_="referrer", content="no-referrer"),
        h("title", title),
        h("link", rel="icon", href=_ICON),
        h("style", style),
    )


def _circumstances(report: Report, material: Material) -> Iterator[str]:
    yield f"run {report.run_id}"
    if report.started_at:
        yield f"began {moment(report.started_at)}"
        yield f"{'ran' if report.finished_at else 'seen for'} {duration(_lifetime_s(report, material))}"
    if report.generations and report.generations[-1].world_size:
        yield judgement.plural(report.generations[-1].world_size, "rank")
    if report.mode:
        yield f"mode {report.mode}"


def _lifetime_s(report: Report, material: Material) -> float:
    """From the launch to the end, or as far as is known; 0 where it is not."""
    return max(0.0, (report.finished_at or material.at) - report.started_at) if report.started_at else 0.0


def _title(report: Report, material: Material, head: judgement.Headline) -> Element:
    advice = h("ul", [h("li", line) for line in head.advice], class_="advice") if head.advice else None
    return h(
        "div",
        h("p", " · ".join(_circumstances(report, material)), class_="run-name"),
        h("h1", head.state),
        h("p", " ".join(head.story), class_="story"),
        advice,
        class_=f"headline {head.tone}",
    )


def _tiles(report: Report, material: Material) -> Element:
    lifetime_s = _lifetime_s(report, material)
    tone, *_ = judgement.evidence(report, material.samples)
    unsettled = sum(not d.mended for d in report.detections)
    pulled = sum(device.cordoned for device in material.devices.values())
    found: list[tuple[str, str, str]] = [
        (
            "Steps",
            f"{max(report.num_steps, report.last_verified_step):,}",
            f"verified through {report.last_verified_step:,}",
        ),
        (
            "Goodput",
            "–" if report.goodput_ratio is None else share(report.goodput_ratio, 1.0),
            f"of {duration(lifetime_s)}" if lifetime_s else "",
        ),
        (
            "Alarms",
            f"{len(report.detections):,}",
            f"{unsettled:,} not mended in place" if report.detections else "",
        ),
        ("Generations", f"{len(report.generations):,}", _last_origin(report)),
        ("Devices out of use", f"{pulled:,}", f"of {len(material.devices):,}" if material.devices else ""),
        (
            "Bit-identical",
            {"good": "yes", "warn": "not known", "bad": "no"}[tone],
            "by the record" if report.exit_code == 0 else "as far as it got",
        ),
    ]
    return h("dl", [_tile(*each) for each in found], class_="tiles")


def _tile(name: str, value: str, note: str) -> Element:
    return h("div", h("dt", name), h("dd", value), h("dd", note, class_="note") if note else None, class_="tile")


def _last_origin(report: Report) -> str:
    if len(report.generations) < 2:
        return "no restart"
    restore = report.generations[-1].restore
    return "restarted" if restore is None or not restore.step else f"the last from step {restore.step:,}"


def _parts(report: Report, material: Material) -> list[Child]:
    tone, sentence, grounds = judgement.evidence(report, material.samples)
    decisions = [d for d in report.decisions if d.outcome != "superseded"]
    seen = tables.draw_detections(report.detections) if report.detections else None
    return [
        _part("What happened", draw_timeline(report, material), empty="No times were recorded."),
        _optional(
            "What was decided, and why", tables.draw_decisions(decisions, report.started_at) if decisions else None
        ),
        _optional("What was seen, by site and kind", seen, kind="half"),
        _part(
            "Where the time went",
            tables.draw_badput(report, _lifetime_s(report, material)),
            empty="It was not recorded.",
            kind="" if seen is None else "half",
        ),
        _part("Loss and step time", draw_curves(report, material.samples), empty="Single steps were not recorded."),
        _part(
            "Is the result bit-identical to a run without faults?",
            tables.draw_evidence(sentence, tone, grounds),
            kind="half",
        ),
        _part("Snapshots and checkpoints", tables.draw_state(report, material), empty="None.", kind="half"),
        _part("Devices", tables.draw_devices(report.detections, material.devices), empty="None is known."),
        _optional("Faults that were injected", tables.draw_drill(report)),
    ]


def _part(name: str, content: Element | None, *, empty: str = "", kind: str = "") -> Element:
    shown = h("p", empty, class_="muted") if content is None else content
    return h("section", h("h2", name), shown, class_=kind or None, id=_anchor(name))


def _optional(name: str, content: Element | None, *, kind: str = "") -> Element | None:
    return None if content is None else _part(name, content, kind=kind)


def _anchor(name: str) -> str:
    return "-".join("".join(letter for letter in name.lower() if letter.isalnum() or letter == " ").split()[:2])


def _foot(report: Report, material: Material, num_unread: int) -> Element:
    remarks = list(material.remarks)
    if report.schema_version != SCHEMA_VERSION:
        version = report.schema_version or "none"
        remarks.append(
            f"The report has schema version {version}, this page knows {SCHEMA_VERSION}: parts may be missing."
        )
    if num_unread:
        remarks.append(f"{judgement.plural(num_unread, 'entry', 'entries')} of the report could not be read.")
    versions = " · ".join(f"{name} {version}" for name, version in report.versions.items())
    return h(
        "footer",
        [h("p", remark, class_="remark") for remark in remarks],
        h("p", f"State of {moment(material.at)}, from {material.source}. {versions}"),
        _notes(report),
    )


def _notes(report: Report) -> Element | None:
    counted: dict[tuple[str, str], int] = {}
    for note in report.notes:
        counted[note.kind, note.message] = counted.get((note.kind, note.message), 0) + 1
    items = [
        h("li", h("b", kind.replace("_", " ")), f": {message}{f' (×{count})' if count > 1 else ''}")
        for (kind, message), count in list(counted.items())[:40]
    ]
    return (
        h("details", h("summary", f"{judgement.plural(len(counted), 'note')} of the ranks"), h("ul", items))
        if items
        else None
    )
