"""Where a rank was when it died: a few bytes in a mapped file beside its logs, which outlive a `kill -9`.

Heartbeats are half a second old when a process is killed. The agent reads this file instead, so that the record of an
exit names the very step. The rank writes it at the start of each micro-step; that is a store to memory, no system call.
"""

from __future__ import annotations

import dataclasses
import mmap
import struct
from pathlib import Path

__all__ = ["LastPlace", "Place", "path_of", "read_place"]

_LAYOUT = struct.Struct("<QII")


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """What was being worked on."""

    step: int
    micro_step: int
    attempt: int


class LastPlace:
    """Told of each micro-step as it begins; the file holds the newest.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(_LAYOUT.size))
        with path.open("r+b") as file:
            self._bytes = mmap.mmap(file.fileno(), _LAYOUT.size)

    def begin(self, step: int, micro_step: int, attempt: int) -> None:
        """A micro-step begins."""
        _LAYOUT.pack_into(self._bytes, 0, step, micro_step, attempt)


def path_of(run_dir: Path, generation: int, rank: int) -> Path:
    """Where the rank writes and its agent reads."""
    return run_dir / "logs" / f"generation-{generation}" / f"rank-{rank}.place"


def read_place(path: Path) -> Place | None:
    """What the file at `path` says; None where the rank never began a micro-step."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    if len(content) != _LAYOUT.size:
        return None
    place = Place(*_LAYOUT.unpack(content))
    return place if place.step else None
