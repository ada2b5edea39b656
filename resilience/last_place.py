"""Where a rank was when it died: a few bytes in a mapped file beside its logs, which outlive a `kill -9`.

Heartbeats are half a second old when a process is killed. The agent reads this file instead, so that the record of an
exit names the very step. The rank writes it at the start of each micro-step; that is a store to memory, no system call.
At its end it leaves there the code that it ends with by itself: what kills it after that changes nothing any more.
"""

from __future__ import annotations

import dataclasses
import mmap
import struct
from pathlib import Path

__all__ = ["LastPlace", "Place", "path_of", "read_end", "read_place"]

_LAYOUT = struct.Struct("<QII")
_END = struct.Struct("<I")
"""The exit code and 1; 0 while the process has not ended by itself."""
_SIZE = _LAYOUT.size + _END.size


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
        path.write_bytes(bytes(_SIZE))
        with path.open("r+b") as file:
            self._bytes = mmap.mmap(file.fileno(), _SIZE)

    def begin(self, step: int, micro_step: int, attempt: int) -> None:
        """A micro-step begins."""
        _LAYOUT.pack_into(self._bytes, 0, step, micro_step, attempt)

    def end(self, exit_code: int) -> None:
        """The process ends by itself, with this code (0 to 255)."""
        _END.pack_into(self._bytes, _LAYOUT.size, exit_code + 1)


def path_of(run_dir: Path, generation: int, rank: int) -> Path:
    """Where the rank writes and its agent reads."""
    return run_dir / "logs" / f"generation-{generation}" / f"rank-{rank}.place"


def read_place(path: Path) -> Place | None:
    """What the file at `path` says; None where the rank never began a micro-step."""
    content = _content(path)
    if content is None:
        return None
    place = Place(*_LAYOUT.unpack_from(content))
    return place if place.step else None


def read_end(path: Path) -> int | None:
    """The exit code that the rank left in the file at `path`; None where it did not end by itself."""
    content = _content(path)
    mark = 0 if content is None else _END.unpack_from(content, _LAYOUT.size)[0]
    return mark - 1 if mark else None


def _content(path: Path) -> bytes | None:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    return content if len(content) == _SIZE else None
