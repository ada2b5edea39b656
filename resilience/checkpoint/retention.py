"""Which checkpoints may be deleted. Pure: what is there and a policy go in, a plan with a reason for each comes out.

Never planned for deletion: what `latest` names, the newest verified one, what was never finished (a save may be
running) and what cannot be told (saved without a manifest, or damaged, unless it was asked for).
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence

__all__ = ["Known", "Planned", "Policy", "Standing", "plan"]


class Standing(enum.StrEnum):
    """What a look at a checkpoint found."""

    VERIFIED = "verified"
    """Every file is as its manifest says."""
    BAD = "bad"
    """Its files are not those of its manifest, its manifest cannot be read, or it may hold damage found later."""
    UNFINISHED = "unfinished"
    """A save began and never ended, or is running."""
    UNKNOWN = "unknown"
    """It has no manifest: nobody can say."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """One checkpoint."""

    tag: str
    standing: Standing
    step: int
    """0 where it cannot be known."""
    at: float
    """When it was saved, in seconds since the Unix epoch."""
    is_latest: bool
    """Whether `latest` names it."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What to keep beyond what is never deleted."""

    keep: int
    """So many of the newest verified ones, at least 1."""
    keep_every: int = 0
    """And each verified one whose step is a multiple of this; 0 for none."""
    drop_bad: bool = False
    """Whether those that do not match their manifest may go, if a newer verified one is kept."""

    def __post_init__(self) -> None:
        if self.keep < 1 or self.keep_every < 0:
            raise ValueError(f"keep = {self.keep} and keep_every = {self.keep_every}: at least 1 and 0")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """What happens to one checkpoint, and why."""

    tag: str
    delete: bool
    reason: str


def plan(known: Sequence[Known], policy: Policy) -> tuple[Planned, ...]:
    """What to do with each, newest first."""
    order = sorted(known, key=lambda each: (each.at, each.step, each.tag), reverse=True)
    newest = [each.tag for each in order if each.standing is Standing.VERIFIED][: policy.keep]
    return tuple(_planned(each, newest, policy) for each in order)


def _planned(each: Known, newest: Sequence[str], policy: Policy) -> Planned:
    kept = _why_kept(each, newest, policy)
    if kept:
        return Planned(tag=each.tag, delete=False, reason=kept)
    if each.standing is Standing.BAD:
        return Planned(tag=each.tag, delete=True, reason="does not match its manifest, and verified ones are kept")
    return Planned(tag=each.tag, delete=True, reason=f"older than the {policy.keep} newest verified")


def _why_kept(each: Known, newest: Sequence[str], policy: Policy) -> str:
    if each.is_latest:
        return "`latest` names it"
    if each.tag in newest:
        return f"number {newest.index(each.tag) + 1} of the {policy.keep} newest verified"
    if each.standing is Standing.UNFINISHED:
        return "its save was never finished, or is running"
    if each.standing is Standing.UNKNOWN:
        return "has no manifest, so nothing is known of it"
    if each.standing is Standing.BAD:
        if not newest:
            return "no verified one is left"
        return "" if policy.drop_bad else "does not match its manifest; look at it, or ask for it to be dropped"
    if policy.keep_every and each.step and each.step % policy.keep_every == 0:
        return f"its step is a multiple of {policy.keep_every}"
    return ""
