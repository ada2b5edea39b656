"""A node's part of a snapshot as one row of bytes, its *volume*: what parity is computed of and peers read ranges of.

The files of its ranks follow each other as the manifest lists them, each rank's trail after its files, as long as its
commit says. What is read is what was hashed, or nothing: a rank that begins to overwrite a slot removes the commit
first, and every reader looks for the commit after it has read.
"""

from __future__ import annotations

import dataclasses
import os
import threading
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path

from resilience.errors import SnapshotError
from resilience.snapshot.arena import Arena
from resilience.snapshot.manifest import Commit, Manifest, parse_commit

__all__ = ["BLOCK_BYTES", "TRAIL", "LocalVolume", "Piece", "pieces_of", "same_data", "volume_bytes"]

BLOCK_BYTES = 960 << 10
"""What is read, sent, encoded and summed at once: with its message below the limit of 1 MiB."""

TRAIL = ""
"""Stands for the trail where the path of a file is expected."""


@dataclasses.dataclass(frozen=True, slots=True)
class Piece:
    """A file, or a trail, in a volume."""

    rank: int
    path: str
    """Relative to the slot; `TRAIL` for the trail."""
    start: int
    """First byte in the volume."""
    end: int


def pieces_of(manifest: Manifest) -> list[Piece]:
    """The pieces of a node's volume, in order and without gaps; empty files have empty pieces."""
    pieces, place = [], 0
    for part in manifest.parts:
        sizes = [(entry.path, entry.size) for entry in part.commit.files]
        for path, size in [*sizes, (TRAIL, part.commit.trail_bytes)]:
            pieces.append(Piece(part.commit.rank, path, place, place + size))
            place += size
    return pieces


def volume_bytes(manifest: Manifest) -> int:
    """The size of a node's volume."""
    return manifest.num_bytes + sum(part.commit.trail_bytes for part in manifest.parts)


def same_data(one: Manifest, other: Manifest) -> bool:
    """Whether two manifests are of the very same commits: a snapshot that was taken again is another one."""
    return _commits(one) == _commits(other)


def _commits(manifest: Manifest) -> list[tuple[str, int, int, int, int]]:
    commits = [part.commit for part in manifest.parts]
    return [(c.run_id, c.generation, c.step, c.rank, c.sequence) for c in commits]


class LocalVolume:
    """Reads the volume of this node from its slots. May be used by several threads."""

    def __init__(self, arena: Arena, manifest: Manifest) -> None:
        self.manifest = manifest
        self.num_bytes = volume_bytes(manifest)
        self._arena = arena
        self._pieces = [piece for piece in pieces_of(manifest) if piece.end > piece.start]
        self._starts = [piece.start for piece in self._pieces]
        self._commits = {part.commit.rank: part.commit for part in manifest.parts}
        self._seen: dict[int, tuple[int, int, int]] = {}
        self._lock = threading.Lock()

    def read(self, start: int, end: int) -> Iterator[bytes]:
        """The bytes from `start` to `end`, in blocks of `BLOCK_BYTES` and a last shorter one.

        Raises:
            SnapshotError: the snapshot is not there any more, or the range is outside of the volume.
        """
        if not 0 <= start <= end <= self.num_bytes:
            raise SnapshotError(f"bytes {start} to {end} of a volume of {self.num_bytes}")
        while start < end:
            stop = min(start + BLOCK_BYTES, end)
            yield self._block(start, stop)
            start = stop

    def _block(self, start: int, end: int) -> bytes:
        block = bytearray(end - start)
        view = memoryview(block)
        place, ranks = start, set()
        index = bisect_right(self._starts, start) - 1
        while place < end:
            piece = self._pieces[index]
            stop = min(piece.end, end)
            self._read_piece(piece, place - piece.start, view[place - start : stop - start])
            ranks.add(piece.rank)
            place, index = stop, index + 1
        for rank in ranks:
            self._check(rank)
        return bytes(block)

    def _read_piece(self, piece: Piece, offset: int, into: memoryview) -> None:
        commit = self._commits[piece.rank]
        slot = self._arena.slot(piece.rank, commit.slot)
        path = self._arena.trail(piece.rank) if piece.path == TRAIL else slot / piece.path
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise SnapshotError(f"{path}: cannot be read ({error.strerror})") from None
        try:
            while into:
                count = os.preadv(descriptor, [into], offset)
                if not count:
                    raise SnapshotError(f"{path}: ends at {offset} bytes")
                into, offset = into[count:], offset + count
        finally:
            os.close(descriptor)

    def _check(self, rank: int) -> None:
        """See that the slot that was read from still holds what was hashed."""
        expected = self._commits[rank]
        path = self._arena.commit(rank, expected.slot)
        try:
            status = path.stat()
            signature = (status.st_ino, status.st_mtime_ns, status.st_size)
            with self._lock:
                if self._seen.get(rank) == signature:
                    return
            commit = parse_commit(path.read_bytes(), source=str(path))
        except FileNotFoundError:
            raise _overwritten(expected) from None
        except OSError as error:
            raise SnapshotError(f"{path}: cannot be read ({error.strerror})") from None
        if (commit.run_id, commit.generation, commit.step, commit.sequence) != (
            expected.run_id,
            expected.generation,
            expected.step,
            expected.sequence,
        ):
            raise _overwritten(expected)
        with self._lock:
            self._seen[rank] = signature


def _overwritten(commit: Commit) -> SnapshotError:
    return SnapshotError(
        f"snapshot of step {commit.step}, generation {commit.generation}: rank {commit.rank} has begun to overwrite it"
    )


def write_all(blocks: Iterator[bytes], into: Path) -> None:
    """Write blocks to a new file.

    Raises:
        SnapshotError: there is no room for them.
    """
    try:
        with into.open("wb") as writer:
            for block in blocks:
                writer.write(block)
    except OSError as error:
        raise SnapshotError(f"{into}: cannot be written ({error.strerror})") from None
