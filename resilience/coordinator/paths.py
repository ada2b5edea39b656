"""Where the coordinator keeps what must be on a local disk. SQLite's WAL is unsafe on network file systems."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

__all__ = ["devices_path", "journal_path", "state_home"]


def state_home(environ: Mapping[str, str]) -> Path:
    """The node-local state directory of this package, by the XDG base directory specification."""
    named = environ.get("XDG_STATE_HOME", "")
    base = Path(named) if named.startswith("/") else Path.home() / ".local" / "state"
    return base / "resilience"


def journal_path(environ: Mapping[str, str], run_id: str) -> Path:
    """The live journal of a run."""
    return state_home(environ) / run_id / "journal.db"


def devices_path(environ: Mapping[str, str]) -> Path:
    """The history of devices over all jobs."""
    return state_home(environ) / "devices.db"
