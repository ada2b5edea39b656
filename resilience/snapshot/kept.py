"""The parity that a node keeps for its group, in `peers/` of its arena: what lies there, and whether it counts.

    peers/group.json                 the generation and its nodes: for a guardian that was started again
    peers/<step>-g<generation>/
      set.json                       members, losses, sizes
      manifest-<i>.json              the manifest of member i: what its files were
      stripe-<t>.parity              this node's parity of stripe t
      stripe-<t>.sums                XXH3-64 of each block of it: those of the data, in order, then that of the parity
      complete                       every member had stored its parity when this was made

A set appears under its name when all of it is stored. It is no secret and no program: JSON, and rows of numbers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import xxhash

from resilience.errors import SnapshotError
from resilience.snapshot.arena import Arena, write_atomically
from resilience.snapshot.groups import Layout
from resilience.snapshot.manifest import Manifest, parse_manifest
from resilience.snapshot.volume import BLOCK_BYTES, same_data

__all__ = ["Kept", "Key", "ParitySet", "Sums", "num_blocks", "parity_of", "parse_set", "parse_sums", "serialise_sums"]

Sums = np.ndarray[tuple[int, int], np.dtype[np.uint64]]
"""(block, place): digests of the data blocks of a stripe, padded, and of one parity block."""

_SET = re.compile(r"(\d+)-g(\d+)\Z")
_DIGEST_BYTES = 16


@dataclasses.dataclass(frozen=True, slots=True, order=True)
class Key:
    """A memory snapshot. Later ones are greater."""

    generation: int
    step: int

    def __str__(self) -> str:
        return f"step {self.step}, generation {self.generation}"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ParitySet:
    """What the parity of a snapshot was made of."""

    run_id: str
    step: int
    generation: int
    members: tuple[str, ...]
    """The group's nodes, in its order."""
    losses: int
    volumes: tuple[int, ...]
    """Bytes of each member's volume."""

    @property
    def key(self) -> Key:
        return Key(self.generation, self.step)

    @property
    def layout(self) -> Layout:
        return Layout.of(self.volumes, self.losses)

    def serialise(self) -> bytes:
        """The content of `set.json`."""
        body = json.dumps(dataclasses.asdict(self), separators=(",", ":")).encode() + b"\n"
        return body + xxhash.xxh3_128_hexdigest(body).encode()


def parse_set(content: bytes, *, source: str) -> ParitySet:
    """Read a `set.json` back.

    Raises:
        SnapshotError: it is torn, damaged or nothing that this package writes.
    """
    body, _, digest = content.rpartition(b"\n")
    if xxhash.xxh3_128_hexdigest(body + b"\n").encode() != digest:
        raise SnapshotError(f"{source}: torn or damaged (its own checksum differs)")
    try:
        fields = json.loads(body)
        members, volumes = tuple(map(str, fields.pop("members"))), tuple(map(int, fields.pop("volumes")))
        parity_set = ParitySet(members=members, volumes=volumes, **fields)
        if len(members) != len(volumes) or not 1 <= parity_set.losses < len(members):
            raise ValueError("members, volumes and losses do not fit")
    except (KeyError, TypeError, ValueError) as error:
        raise SnapshotError(f"{source}: not what this package writes ({error})") from None
    return parity_set


def num_blocks(layout: Layout) -> int:
    """Blocks of each segment; the last one may be shorter."""
    return -(-layout.segment_bytes // BLOCK_BYTES)


def serialise_sums(sums: Sums) -> bytes:
    """The content of a `.sums` file."""
    content = sums.astype("<u8").tobytes()
    return content + xxhash.xxh3_128_digest(content)


def parse_sums(content: bytes, layout: Layout, *, source: str) -> Sums:
    """Read a `.sums` file back, shape (blocks, data blocks of a stripe + 1).

    Raises:
        SnapshotError: it is torn or damaged.
    """
    body, digest = content[:-_DIGEST_BYTES], content[-_DIGEST_BYTES:]
    shape = num_blocks(layout), layout.num_members - layout.losses + 1
    if len(body) != 8 * shape[0] * shape[1] or xxhash.xxh3_128_digest(body) != digest:
        raise SnapshotError(f"{source}: torn or damaged (its own checksum differs)")
    return np.frombuffer(body, "<u8").astype(np.uint64).reshape(shape)


class Kept:
    """The parity sets of one arena. Reads from the disk each time, so that it is never wrong after a restart."""

    def __init__(self, arena: Arena) -> None:
        self.path = arena.peers
        self.group = arena.peers / "group.json"

    def folder(self, key: Key) -> Path:
        return self.path / f"{key.step}-g{key.generation}"

    def building(self, key: Key, number: int) -> Path:
        """Where the `number`-th attempt at a set is while not all of it is stored."""
        return self.path / f".{key.step}-g{key.generation}-{number}"

    def publish(self, folder: Path, key: Key) -> None:
        """Give a set that is stored in full its name."""
        self.remove(key)
        folder.rename(self.folder(key))

    def stored(self) -> list[Key]:
        """Sets that are stored, oldest first."""
        names = [entry.name for entry in self.path.iterdir()] if self.path.is_dir() else []
        return sorted(Key(int(match[2]), int(match[1])) for name in names if (match := _SET.match(name)))

    def read(self, key: Key) -> ParitySet | None:
        """A set; None where there is none that can be read."""
        path = self.folder(key) / "set.json"
        try:
            return parse_set(path.read_bytes(), source=str(path))
        except (OSError, SnapshotError):
            return None

    def manifest(self, key: Key, place: int) -> Manifest | None:
        """The manifest of the member at `place`."""
        path = self.folder(key) / f"manifest-{place}.json"
        try:
            return parse_manifest(path.read_bytes(), source=str(path))
        except (OSError, SnapshotError):
            return None

    def is_complete(self, key: Key) -> bool:
        return (self.folder(key) / "complete").exists()

    def complete(self, key: Key) -> None:
        """From now on this set counts."""
        write_atomically(self.folder(key) / "complete", b"")

    def num_bytes(self, key: Key) -> int:
        """Of its parity."""
        with contextlib.suppress(OSError):
            return sum(path.stat().st_size for path in self.folder(key).glob("*.parity"))
        return 0

    def remove(self, key: Key) -> None:
        """Remove a set. Its mark goes first, so that what is half removed does not count."""
        (self.folder(key) / "complete").unlink(missing_ok=True)
        shutil.rmtree(self.folder(key), ignore_errors=True)

    def remove_unfinished(self) -> None:
        """Remove what was never stored in full."""
        for entry in self.path.glob(".*-g*"):
            shutil.rmtree(entry, ignore_errors=True)

    def go_back(self, generation: int, step: int | None) -> None:
        """Drop the parity of what earlier generations took after `step`, or of all where there is none."""
        for key in self.stored():
            if key.generation < generation and (step is None or key.step > step):
                self.remove(key)


def parity_of(arena: Arena, manifest: Manifest) -> tuple[tuple[str, ...], int]:
    """The group whose exchange of this snapshot is complete here, and the losses that it makes up for.

    Args:
        arena: of this node.
        manifest: this node's, of the snapshot.

    Returns:
        No nodes and 0 where there is none.
    """
    kept, key = Kept(arena), Key(manifest.generation, manifest.step)
    parity_set = kept.read(key) if kept.is_complete(key) else None
    if parity_set is None or manifest.node not in parity_set.members:
        return (), 0
    own = kept.manifest(key, parity_set.members.index(manifest.node))
    if own is None or not same_data(own, manifest):
        return (), 0
    return parity_set.members, parity_set.losses
