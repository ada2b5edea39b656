"""Pages drawn from what a test makes up, and what is in them."""

from __future__ import annotations

import collections
from collections.abc import Callable, Mapping
from html.parser import HTMLParser
from typing import Any

import pytest

from resilience.report_page import Material, draw_page

BEGAN = 1_700_000_000.0


class Page(HTMLParser):
    """A page as its elements; refuses one that is not well nested."""

    VOID = frozenset({"link", "meta"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.source = text
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        """Everything that is read, tooltips included."""
        return " ".join(" ".join(self.texts).split())

    def with_class(self, name: str) -> list[dict[str, str]]:
        """The attributes of every element of a class."""
        return [attributes for _, attributes in self.elements if name in attributes.get("class", "").split()]

    @property
    def tags(self) -> collections.Counter[str]:
        return collections.Counter(tag for tag, _ in self.elements)


Draw = Callable[..., Page]


@pytest.fixture
def draw() -> Draw:
    """Draw the page of a report; other arguments are fields of `Material`."""

    def draw(report: Mapping[str, Any], **fields: Any) -> Page:
        known: dict[str, Any] = {
            "at": BEGAN + 600,
            "is_live": False,
            "samples": None,
            "devices": {},
            "snapshot_seconds": {},
            "source": "a test",
        }
        return Page(draw_page(Material(report=report, **{**known, **fields})))

    return draw


def report(**fields: Any) -> dict[str, Any]:
    """A run of ten minutes and a hundred steps that ended well; what a test cares about is laid over it."""
    return {
        "schema_version": 1,
        "run_id": "r1",
        "mode": "enforce",
        "versions": {"resilience": "0.1.0"},
        "started_at": BEGAN,
        "finished_at": BEGAN + 600,
        "deterministic": True,
        "outcome": "finished",
        "exit_code": 0,
        "reason": "all ranks ended with 0",
        "num_steps": 100,
        "last_verified_step": 100,
        "goodput_ratio": 0.9,
        "badput_s": {"init": 40.0, "other": 20.0},
        "generations": [
            {
                "generation": 1,
                "began_at": BEGAN + 1,
                "world_size": 2,
                "reason": "the run starts",
                "first_step_at": BEGAN + 40,
                "ended_at": BEGAN + 600,
            }
        ],
        "faults_injected": [],
        "detections": [],
        "propagated": [],
        "decisions": [],
        "checkpoints": [],
        "notes": [],
        **fields,
    }


def alarm(step: int, **fields: Any) -> dict[str, Any]:
    """A detection, a second for each step after the beginning."""
    return {
        "detection_id": f"g1-r0-{step}",
        "generation": 1,
        "step": step,
        "rank": 0,
        "node": "a",
        "device": "device-0",
        "site": "linear.out",
        "layer": 0,
        "check": "checksum",
        "kind": "mismatch",
        "verdict": "transient",
        "mended": True,
        "bit_exact": True,
        "detected_at": BEGAN + 40 + step,
        **fields,
    }


def decision(step: int, action: str = "corrected", **fields: Any) -> dict[str, Any]:
    """A decision, a second for each step after the beginning."""
    return {
        "decision_id": f"g1-s{step}-a0",
        "generation": 1,
        "step": step,
        "action": action,
        "reason": f"because of step {step}",
        "outcome": "succeeded",
        "origin": "coordinator",
        "decided_at": BEGAN + 40 + step,
        **fields,
    }
