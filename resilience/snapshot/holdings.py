"""What a guardian hands out to those of other nodes: ranges of its part of a snapshot, manifests, and parity.

Only what is addressed by a snapshot's key; a name from the network never becomes a path.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from resilience.errors import SnapshotError
from resilience.snapshot.arena import Arena
from resilience.snapshot.inventory import is_still_there, read_commits, read_manifest
from resilience.snapshot.kept import Kept, Key, ParitySet
from resilience.snapshot.manifest import Manifest, serialise_manifest
from resilience.snapshot.volume import BLOCK_BYTES, LocalVolume, same_data

__all__ = ["Description", "Holdings", "Kind", "Ref", "Source", "Stored", "read_all"]

_MAX_WHOLE_BYTES = 1 << 30


class Kind(enum.StrEnum):
    """What can be read of a snapshot."""

    DATA = "data"
    MANIFEST = "manifest"
    PARITY = "parity"
    SUMS = "sums"
    LAYOUT = "layout"


@dataclasses.dataclass(frozen=True, slots=True)
class Ref:
    """Something that a node may hold."""

    key: Key
    kind: Kind
    node: str = ""
    """With `MANIFEST`: whose."""
    stripe: int = 0
    """With `PARITY` and `SUMS`."""

    def __str__(self) -> str:
        detail = {Kind.MANIFEST: f" of {self.node}", Kind.PARITY: f" {self.stripe}", Kind.SUMS: f" {self.stripe}"}
        return f"{self.kind}{detail.get(self.kind, '')} of the snapshot of {self.key}"


@dataclasses.dataclass(frozen=True, slots=True)
class Stored:
    """A parity set that a node has stored."""

    key: Key
    members: tuple[str, ...]
    losses: int
    complete: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Description:
    """What a node holds."""

    generation: int
    snapshots: frozenset[Key]
    parity: tuple[Stored, ...]

    def stored(self, key: Key) -> Stored | None:
        return next((each for each in self.parity if each.key == key), None)


class Source(Protocol):
    """A node to read from: this one, or another one by way of its guardian."""

    def read(self, ref: Ref, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """A range, in blocks of `BLOCK_BYTES` and a last shorter one; to the end where `end` is None.

        Raises:
            SnapshotError: it is not there, or cannot be reached.
        """


def read_all(source: Source, ref: Ref) -> bytes:
    """All of something small: a manifest, sums, a layout.

    Raises:
        SnapshotError: it is not there, cannot be reached, or is not small.
    """
    content = bytearray()
    for block in source.read(ref):
        content += block
        if len(content) > _MAX_WHOLE_BYTES:
            raise SnapshotError(f"{ref}: more than {_MAX_WHOLE_BYTES} bytes")
    return bytes(content)


class Holdings:
    """This node as a source. May be used by several threads."""

    def __init__(self, arena: Arena, *, run_id: str, node: str) -> None:
        self._arena = arena
        self._run_id = run_id
        self._node = node
        self._kept = Kept(arena)
        self._lock = threading.Lock()
        self._volumes: dict[Key, LocalVolume] = {}

    def describe(self, generation: int) -> Description:
        """What is here; `generation` is the one that this node is in."""
        return Description(generation, frozenset(self.snapshots()), tuple(self._stored()))

    def snapshots(self) -> list[Key]:
        """This node's parts that are published and still there, oldest first."""
        commits = read_commits(self._arena)
        found = []
        for step, generation in self._arena.published():
            manifest = read_manifest(self._arena, step, generation)
            if manifest is None or manifest.run_id != self._run_id:
                continue
            if all(is_still_there(part, commits) for part in manifest.parts):
                found.append(Key(generation, step))
        return found

    def manifest(self, key: Key) -> Manifest:
        """This node's own manifest of a snapshot.

        Raises:
            SnapshotError: there is none.
        """
        manifest = read_manifest(self._arena, key.step, key.generation)
        if manifest is None or manifest.run_id != self._run_id:
            raise SnapshotError(f"{self._node}: the snapshot of {key} is not here")
        return manifest

    def read(self, ref: Ref, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """See `Source`."""
        match ref.kind:
            case Kind.DATA:
                volume = self._volume(ref.key)
                yield from volume.read(start, volume.num_bytes if end is None else end)
            case Kind.MANIFEST:
                content = serialise_manifest(self._manifest_of(ref))
                yield from _slices(content[start:end])
            case Kind.LAYOUT:
                yield from _slices(self._set(ref).serialise()[start:end])
            case Kind.PARITY:
                yield from self._file(ref, f"stripe-{ref.stripe}.parity", start, end)
            case Kind.SUMS:
                yield from self._file(ref, f"stripe-{ref.stripe}.sums", start, end)

    def _stored(self) -> Iterator[Stored]:
        for key in self._kept.stored():
            found = self._kept.read(key)
            if found is not None and found.run_id == self._run_id:
                yield Stored(key, found.members, found.losses, self._kept.is_complete(key))

    def _volume(self, key: Key) -> LocalVolume:
        manifest = self.manifest(key)
        with self._lock:
            volume = self._volumes.get(key)
            if volume is None or not same_data(volume.manifest, manifest):
                volume = LocalVolume(self._arena, manifest)
                self._volumes = {key: volume, **dict(list(self._volumes.items())[:3])}
            return volume

    def _manifest_of(self, ref: Ref) -> Manifest:
        if ref.node == self._node:
            with contextlib.suppress(SnapshotError):
                return self.manifest(ref.key)
        parity_set = self._set(ref)
        found = None
        if ref.node in parity_set.members:
            found = self._kept.manifest(ref.key, parity_set.members.index(ref.node))
        if found is None:
            raise SnapshotError(f"{self._node}: has no {ref}")
        return found

    def _set(self, ref: Ref) -> ParitySet:
        found = self._kept.read(ref.key)
        if found is None or found.run_id != self._run_id:
            raise SnapshotError(f"{self._node}: keeps no parity of the snapshot of {ref.key}")
        return found

    def _file(self, ref: Ref, name: str, start: int, end: int | None) -> Iterator[bytes]:
        self._set(ref)
        path = self._kept.folder(ref.key) / name
        if not path.is_file():
            raise SnapshotError(f"{self._node}: has no {ref}")
        yield from _range(path, start, end)


def _range(path: Path, start: int, end: int | None) -> Iterator[bytes]:
    try:
        with path.open("rb", buffering=0) as reader:
            reader.seek(start)
            while end is None or start < end:
                block = reader.read(BLOCK_BYTES if end is None else min(BLOCK_BYTES, end - start))
                if not block:
                    break
                yield block
                start += len(block)
    except OSError as error:
        raise SnapshotError(f"{path}: cannot be read ({error.strerror})") from None
    if end is not None and start < end:
        raise SnapshotError(f"{path}: ends at {start} bytes, not {end}")


def _slices(content: bytes) -> Iterator[bytes]:
    for start in range(0, len(content), BLOCK_BYTES):
        yield content[start : start + BLOCK_BYTES]
