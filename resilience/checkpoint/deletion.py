"""Carrying out a plan of `retention`: what is deleted disappears by one rename, and only then piece by piece.

A process that dies in between leaves a folder that no load looks at; the next deletion in that save_dir clears it away.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from resilience.checkpoint.convert import LATEST_UNIVERSAL, universal_of
from resilience.checkpoint.publish import read_latest, read_marker, sync_folder
from resilience.checkpoint.retention import Known, Planned, Standing
from resilience.checkpoint.verify import Inspection, State, list_files
from resilience.errors import CheckpointError

__all__ = ["Deleted", "delete", "known"]

_PREFIX = ".resilience-deleted-"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Deleted:
    """One checkpoint that is gone."""

    tag: str
    num_bytes: int
    """With its universal form."""


def known(found: Inspection) -> Known:
    """What the plan needs of a checkpoint whose files were read."""
    standing = {
        State.PUBLISHED: Standing.VERIFIED if found.good else Standing.BAD,
        State.DAMAGED: Standing.BAD,
        State.DOUBTED: Standing.BAD,
        State.UNFINISHED: Standing.UNFINISHED,
        State.PLAIN: Standing.UNKNOWN,
    }[found.state]
    return Known(tag=found.tag, standing=standing, step=found.step, at=found.at, is_latest=found.latest)


def delete(save_dir: Path, plan: Iterable[Planned]) -> list[Deleted]:
    """Delete what the plan says, with what was converted from it; oldest last in the plan goes first.

    Raises:
        CheckpointError: something cannot be deleted; what came before is gone, what comes after is untouched.
    """
    done: list[Deleted] = []
    for left in save_dir.glob(f"{_PREFIX}*"):
        shutil.rmtree(left, ignore_errors=True)
    for each in reversed(list(plan)):
        tag_dir = save_dir / each.tag
        if not each.delete or _is_in_use(save_dir, each.tag):
            continue
        num_bytes = sum(_size(path) for path in (tag_dir, universal_of(tag_dir)))
        try:
            for path in (universal_of(tag_dir), tag_dir):
                _remove(save_dir, path)
        except OSError as error:
            raise CheckpointError(f"{tag_dir} cannot be deleted ({error.strerror}); {len(done)} were") from None
        done.append(Deleted(tag=each.tag, num_bytes=num_bytes))
    return done


def _is_in_use(save_dir: Path, tag: str) -> bool:
    """Whether a run has made it the latest, or saves it anew, since the plan was made."""
    return read_latest(save_dir) == tag or read_marker(save_dir / tag) is not None


def _size(path: Path) -> int:
    return sum(list_files(path).values()) if path.is_dir() else 0


def _remove(save_dir: Path, path: Path) -> None:
    if not path.is_dir():
        return
    away = save_dir / f"{_PREFIX}{path.name}-{os.getpid()}"
    path.rename(away)
    sync_folder(save_dir)
    pointer = save_dir / LATEST_UNIVERSAL
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if pointer.read_text(encoding="utf-8").strip() == path.name:
            pointer.unlink()
    with contextlib.suppress(FileNotFoundError):  # another deletion clears away what is left, too
        shutil.rmtree(away)
