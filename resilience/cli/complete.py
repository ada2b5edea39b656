"""What the shell completes beside verbs and options: decisions, devices and nodes of the run, and runs themselves.

Whoever presses Tab must never see a complaint: where nothing can be asked, nothing is offered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from resilience.errors import ResilienceError

if TYPE_CHECKING:
    from resilience.cli.source import Source

__all__ = ["decision_ids", "device_names", "run_directories", "run_names"]

Offer = tuple[str, str]
"""What may stand there, and what it is."""
_RUNS = Path("resilience-runs")


def decision_ids(context: typer.Context, incomplete: str) -> list[Offer]:
    """Decisions of the run that the options so far name, newest first."""

    def ask(source: Source) -> list[Offer]:
        return [(one.decision_id, one.reason) for one in reversed(source.decisions(limit=0).decisions)]

    return _offers(context, ask, incomplete)


def device_names(context: typer.Context, incomplete: str) -> list[Offer]:
    """Devices and nodes of the run that the options so far name."""

    def ask(source: Source) -> list[Offer]:
        found = source.devices().devices
        devices = [(one.device, f"on {one.node}{', cordoned' if one.cordoned else ''}") for one in found]
        return devices + [(node, "a node: all its devices") for node in dict.fromkeys(one.node for one in found)]

    return _offers(context, ask, incomplete)


def run_directories(incomplete: str) -> list[Offer]:
    """Directories of runs below ./resilience-runs."""
    return [(str(path), state) for path, state in _runs() if str(path).startswith(incomplete)]


def run_names(incomplete: str) -> list[Offer]:
    """Names of runs in ./resilience-runs."""
    return [(path.name, state) for path, state in _runs() if path.name.startswith(incomplete)]


def _runs() -> Iterator[tuple[Path, str]]:
    for path in sorted(_RUNS.glob("*/coordinator.json"), reverse=True):
        yield path.parent, "has ended" if (path.parent / "report.json").is_file() else ""


def _offers(context: typer.Context, ask: Callable[[Source], list[Offer]], incomplete: str) -> list[Offer]:
    """What `ask` gets from who answers for the run; nothing where there is none, or it goes wrong."""
    from resilience.cli.options import source

    given = context.params
    try:
        offers = ask(source(given.get("address"), given.get("token_file"), given.get("run_dir"), quiet=True))
    except ResilienceError:
        return []
    return [offer for offer in offers if offer[0].startswith(incomplete)]
