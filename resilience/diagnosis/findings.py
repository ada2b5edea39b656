"""What the doctor says: one finding for each look."""

from __future__ import annotations

import dataclasses
import enum
import importlib.metadata

__all__ = ["Finding", "Level", "fail", "ok", "version_of", "warn"]


class Level(enum.StrEnum):
    """How bad a finding is."""

    OK = "ok"
    WARN = "warn"
    """A run works, with less."""
    FAIL = "fail"
    """A run does not start, or not well."""


@dataclasses.dataclass(frozen=True, slots=True)
class Finding:
    """One line of the doctor's."""

    level: Level
    name: str
    detail: str
    fix: str = ""


def ok(name: str, detail: str) -> Finding:
    """Nothing to do."""
    return Finding(Level.OK, name, detail)


def warn(name: str, detail: str, fix: str) -> Finding:
    """A run works, with less; `fix` says how to have all of it."""
    return Finding(Level.WARN, name, detail, fix)


def fail(name: str, detail: str, fix: str) -> Finding:
    """A run does not start, or not well, until `fix` is done."""
    return Finding(Level.FAIL, name, detail, fix)


def version_of(name: str) -> str | None:
    """The installed version of a distribution; None where it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
