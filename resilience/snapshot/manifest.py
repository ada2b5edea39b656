"""What is said of a memory snapshot: commits of ranks, manifests of nodes, holds. Pure: no clock, no disk, no engine.

A rank's *commit* says that one slot of its arena is whole. The guardian adds the digest of every record, and of the
bytes between the records: then it is a *part*. The parts of a node's ranks make the *manifest* that it publishes, and
the parts of all ranks that a restore needs make the manifest in the folder that is prepared for them.

Everything is JSON whose last member is the XXH3-128 of all bytes before it, so that a flipped byte anywhere is found.
Checksums guard against broken hardware and torn writes, not against somebody who can write to the arena.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, TypeVar

import xxhash

from resilience.errors import SnapshotError

__all__ = [
    "SCHEMA_VERSION",
    "STATE",
    "Commit",
    "FileEntry",
    "Hold",
    "Manifest",
    "Part",
    "Record",
    "is_hashed",
    "merge",
    "parse_commit",
    "parse_holds",
    "parse_manifest",
    "serialise_commit",
    "serialise_holds",
    "serialise_manifest",
]

T = TypeVar("T")

SCHEMA_VERSION = 1
STATE = "state"
"""Folder of a slot that holds the files of DeepSpeed's checkpoint."""

_SEAL = re.compile(rb',"checksum":"([0-9a-f]{32})"\}\n\Z')
_DIGEST = re.compile(r"[0-9a-f]{32}\Z")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """A piece of a file whose place and size stay the same from snapshot to snapshot: the bytes of one storage."""

    name: str
    offset: int
    """Of its first byte in the file."""
    size: int
    """Bytes."""
    digest: str = ""
    """XXH3-128 in hexadecimal; empty in a commit."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """One file of a slot."""

    path: str
    """Relative to the slot, with slashes: `state/…`."""
    size: int
    """Bytes."""
    records: tuple[Record, ...] = ()
    """By offset, without overlap."""
    rest: str = ""
    """XXH3-128 of all bytes outside the records, in their order; empty in a commit."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """A rank's word that one of its slots is whole."""

    run_id: str
    generation: int
    step: int
    """The snapshot is the state at the end of the `engine.step()` that took this step."""
    rank: int
    world_size: int
    slot: int
    sequence: int
    """Counts the rank's commits in this generation, from 1: no two of a rank in a generation share it."""
    at: float
    """Seconds since the Unix epoch."""
    clean_through: int
    """Newest step that was known to be clean when this was written."""
    blocked_s: float
    """How long training waited for the copy."""
    random: Mapping[str, Any]
    """What `resilience.checkpoint.randomness.capture` gave."""
    counters: Mapping[str, int]
    """micro_steps, global_steps, global_samples, skipped_steps and whatever else a load does not bring back."""
    trail_bytes: int
    """Size of `trail.bin` at that moment; 0 where none is kept."""
    files: tuple[FileEntry, ...]

    @property
    def num_bytes(self) -> int:
        """Of all files."""
        return sum(entry.size for entry in self.files)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A rank's commit with the digests of all it names."""

    commit: Commit
    """Its files and their records carry digests."""
    trail: str
    """XXH3-128 of the first `trail_bytes` bytes of the trail; empty where none is kept."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Parts of one snapshot, whole and hashed: those of a node's ranks, or those that a restore needs."""

    run_id: str
    generation: int
    step: int
    world_size: int
    node: str
    """Whose it is."""
    at: float
    """When the last part was committed, in seconds since the Unix epoch."""
    clean_through: int
    """Newest step that was known to be clean when this was published; later commits know more."""
    parts: tuple[Part, ...]
    """In the order of the ranks."""

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(part.commit.rank for part in self.parts)

    @property
    def num_bytes(self) -> int:
        """Of all files of all parts."""
        return sum(part.commit.num_bytes for part in self.parts)

    def part(self, rank: int) -> Part:
        """The part of a rank.

        Raises:
            SnapshotError: it is not in here.
        """
        for part in self.parts:
            if part.commit.rank == rank:
                return part
        raise SnapshotError(
            f"snapshot of step {self.step}, generation {self.generation}: rank {rank} has no part in the manifest of "
            f"{self.node}, only {list(self.ranks)}"
        )


@dataclasses.dataclass(frozen=True, slots=True, order=True)
class Hold:
    """A snapshot that ranks must not overwrite, and why."""

    step: int
    why: str
    generation: int = 0
    """Of the snapshot; 0 for any."""


# ------ writing


def serialise_commit(commit: Commit) -> bytes:
    """The content of `commit.json`."""
    return _seal(_commit_body(commit, digests=False))


def serialise_manifest(manifest: Manifest) -> bytes:
    """The content of a file in `manifests/`, and of `snapshot.json`."""
    body = {
        "schema": SCHEMA_VERSION,
        **{name: getattr(manifest, name) for name in ("run_id", "generation", "step", "world_size", "node", "at")},
        "clean_through": manifest.clean_through,
        "parts": [{**_commit_body(part.commit, digests=True), "trail": part.trail} for part in manifest.parts],
    }
    return _seal(body)


def serialise_holds(holds: Iterable[Hold]) -> bytes:
    """The content of `holds.json`."""
    held = [dataclasses.asdict(hold) for hold in sorted(set(holds))]
    return _seal({"schema": SCHEMA_VERSION, "holds": held})


def _commit_body(commit: Commit, *, digests: bool) -> dict[str, Any]:
    plain = {
        field.name: getattr(commit, field.name) for field in dataclasses.fields(Commit) if field.name not in ("files",)
    }
    files = [_file_body(entry, digests=digests) for entry in commit.files]
    return {"schema": SCHEMA_VERSION, **plain, "files": files}


def _file_body(entry: FileEntry, *, digests: bool) -> dict[str, Any]:
    records = [
        {"name": r.name, "offset": r.offset, "size": r.size, **({"digest": r.digest} if digests else {})}
        for r in entry.records
    ]
    body: dict[str, Any] = {"path": entry.path, "size": entry.size, "records": records}
    if digests:
        body["rest"] = entry.rest
    return body


def _seal(body: Mapping[str, Any]) -> bytes:
    text = json.dumps(body, separators=(",", ":")).encode()[:-1]
    return text + b',"checksum":"%s"}\n' % xxhash.xxh3_128_hexdigest(text).encode()


# ------ reading


def parse_commit(content: bytes, *, source: str) -> Commit:
    """Read a commit back.

    Args:
        content: what `serialise_commit` wrote.
        source: what to call it in an error.

    Raises:
        SnapshotError: it is torn, damaged, of another version, or names files outside of its slot.
    """
    return _parsed(_commit, _open(content, source), source)


def parse_manifest(content: bytes, *, source: str) -> Manifest:
    """Read a manifest back; the parts belong to the snapshot that it names.

    Raises:
        SnapshotError: as `parse_commit`, or its parts are of several snapshots.
    """
    return _parsed(_manifest, _open(content, source), source)


def parse_holds(content: bytes, *, source: str) -> tuple[Hold, ...]:
    """Read `holds.json` back.

    Raises:
        SnapshotError: it is torn, damaged or of another version.
    """
    return _parsed(_holds, _open(content, source), source)


def merge(manifests: Sequence[Manifest], *, ranks: Iterable[int], node: str) -> Manifest:
    """One manifest with the parts of these ranks, from manifests of the same snapshot on several nodes.

    Args:
        manifests: where the parts are looked for, the first ones first.
        ranks: whose parts are wanted.
        node: who is going to load it.

    Raises:
        SnapshotError: the manifests are of several snapshots, or a part is in none of them.
    """
    first = manifests[0]
    for other in manifests[1:]:
        if _identity(other) != _identity(first):
            raise SnapshotError(f"manifests of {first.node} and {other.node} are of different snapshots")
    parts = []
    for rank in sorted(set(ranks)):
        found = [part for manifest in manifests for part in manifest.parts if part.commit.rank == rank]
        if not found:
            raise SnapshotError(
                f"snapshot of step {first.step}, generation {first.generation}: no manifest has rank {rank}'s part"
            )
        parts.append(found[0])
    return dataclasses.replace(
        first,
        node=node,
        at=max(part.commit.at for part in parts),
        clean_through=max(manifest.clean_through for manifest in manifests),
        parts=tuple(parts),
    )


def is_hashed(part: Part) -> bool:
    """Whether every byte of a part is covered by a digest."""
    files = part.commit.files
    covered = all(entry.rest and all(record.digest for record in entry.records) for entry in files)
    return covered and bool(part.trail or not part.commit.trail_bytes)


def _identity(snapshot: Manifest | Commit) -> tuple[str, int, int, int]:
    return snapshot.run_id, snapshot.generation, snapshot.step, snapshot.world_size


def _open(content: bytes, source: str) -> dict[str, Any]:
    """The body, after its checksum and its version were seen to be right."""
    seal = _SEAL.search(content)
    if seal is None:
        raise SnapshotError(f"{source}: torn or damaged (no checksum at its end)")
    body = content[: seal.start()]
    if xxhash.xxh3_128_hexdigest(body).encode() != seal[1]:
        raise SnapshotError(f"{source}: damaged (its own checksum differs)")
    try:
        parsed = json.loads(body + b"}")
    except ValueError:
        raise SnapshotError(f"{source}: not what this package writes (not JSON)") from None
    version = parsed.get("schema") if isinstance(parsed, dict) else None
    if version != SCHEMA_VERSION:
        raise SnapshotError(f"{source}: has version {version!r}; this package reads {SCHEMA_VERSION}")
    assert isinstance(parsed, dict)
    return parsed


def _parsed(read: Callable[[dict[str, Any]], T], body: dict[str, Any], source: str) -> T:
    try:
        return read(body)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise SnapshotError(f"{source}: not what this package writes ({error})") from None


def _commit(body: Mapping[str, Any]) -> Commit:
    files = tuple(_file(entry) for entry in body["files"])
    for name in ("generation", "step", "rank", "world_size", "slot", "sequence", "clean_through", "trail_bytes"):
        _count(name, body[name])
    return Commit(
        files=files,
        **{field.name: body[field.name] for field in dataclasses.fields(Commit) if field.name != "files"},
    )


def _manifest(body: Mapping[str, Any]) -> Manifest:
    parts = tuple(Part(commit=_commit(part), trail=_digest("trail", part["trail"])) for part in body["parts"])
    plain = [field.name for field in dataclasses.fields(Manifest) if field.name != "parts"]
    manifest = Manifest(parts=parts, **{name: body[name] for name in plain})
    for part in parts:
        if _identity(part.commit) != _identity(manifest):
            raise ValueError(f"the part of rank {part.commit.rank} is of another snapshot")
        if not is_hashed(part):
            raise ValueError(f"the part of rank {part.commit.rank} lacks digests")
    return manifest


def _holds(body: Mapping[str, Any]) -> tuple[Hold, ...]:
    return tuple(Hold(step=h["step"], why=h["why"], generation=h["generation"]) for h in body["holds"])


def _file(body: Mapping[str, Any]) -> FileEntry:
    path = PurePosixPath(body["path"])
    if path.is_absolute() or ".." in path.parts or path.parts[:1] != (STATE,) or len(path.parts) < 2:
        raise ValueError(f"{body['path']!r} is outside of {STATE}/")
    size, end = _count("size", body["size"]), 0
    records = []
    for entry in body["records"]:
        offset, length = _count("offset", entry["offset"]), _count("size", entry["size"])
        if offset < end or offset + length > size:
            raise ValueError(f"record {entry['name']!r} of {body['path']} overlaps another, or the end of the file")
        end = offset + length
        digest = _digest("digest", entry.get("digest", ""))
        records.append(Record(name=str(entry["name"]), offset=offset, size=length, digest=digest))
    return FileEntry(path=str(path), size=size, records=tuple(records), rest=_digest("rest", body.get("rest", "")))


def _count(name: str, value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{name} = {value!r} is no count")
    return value


def _digest(name: str, value: Any) -> str:
    if value != "" and _DIGEST.match(value) is None:
        raise ValueError(f"{name} = {value!r} is no XXH3-128")
    return str(value)
