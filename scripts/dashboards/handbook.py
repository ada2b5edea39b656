"""docs/runbook.md as a dashboard, so that a link from a panel needs nothing outside Grafana: a panel for each alert."""

from __future__ import annotations

import re
from pathlib import Path

from grafana_foundation_sdk.builders import dashboard, text
from grafana_foundation_sdk.models.text import TextMode

__all__ = ["build", "number_of", "sections"]

RUNBOOK = Path(__file__).parents[2] / "docs" / "runbook.md"


def sections() -> dict[str, str]:
    """Alert -> what the runbook says of it, in the order of the page."""
    parts = re.split(r"^## (Resilience\w+)$", RUNBOOK.read_text("utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], (body.strip() for body in parts[2::2]), strict=True))


def number_of(alert: str) -> int:
    """The number of an alert's panel, for `viewPanel`.

    Raises:
        ValueError: the runbook has no section of that name.
    """
    return list(sections()).index(alert) + 1


def build() -> dashboard.Dashboard:
    """The page; it has neither queries nor variables."""
    board = dashboard.Dashboard("Runbook").uid("resilience-runbook").tags(["resilience"]).readonly()
    board = board.description("What each alert means and what to do, from docs/runbook.md")
    for alert, content in sections().items():
        panel = text.Panel().title(alert).description("From docs/runbook.md").content(content)
        board = board.with_panel(panel.mode(TextMode.MARKDOWN).id(number_of(alert)).height(10).span(24))
    return board
