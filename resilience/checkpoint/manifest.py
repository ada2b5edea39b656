"""What a checkpoint's manifest says, how it is written down and compared with what is found. Pure: no clock, no disk.

A manifest is JSON. It names every file below the tag's directory with its size and SHA-256, and it carries a checksum
of itself, so that a flipped byte in it is found as well. SHA-256 was chosen because anybody can check it with
`sha256sum`, it is in the standard library, and processors have instructions for it (1.4 GB/s on one core without
tuning, against 1.0 for BLAKE2b): the ranks hash different files at the same time, so a disk is the limit before it.
A checksum guards against broken hardware and torn writes, not against someone who can write to the directory.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath
from typing import Any

from resilience.errors import CheckpointError

__all__ = [
    "ALGORITHM",
    "SCHEMA_VERSION",
    "FileEntry",
    "Manifest",
    "Problem",
    "ProblemKind",
    "assign",
    "compare",
    "describe",
    "fingerprint",
    "is_loaded",
    "parse",
    "serialise",
    "visible",
]

SCHEMA_VERSION = 1
ALGORITHM = "sha256"

# DeepSpeed finds its files in the tag's directory by pattern, so that a stray one among them would be loaded. Other
# `.pt` files are the script's own, and what lies in a folder of their names belongs to another tag.
_LOADED_SUFFIXES = ("model_states.pt", "optim_states.pt")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """One file of a checkpoint."""

    size: int
    """Bytes."""
    digest: str
    """SHA-256 of its content, in hexadecimal."""
    node: str | None = None
    """The node that alone holds it; None for a file on storage that all nodes share."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """A complete checkpoint, as the ranks that wrote it agreed on it."""

    run_id: str
    generation: int
    """Generation of the run that wrote it. A lower one never overwrites it."""
    tag: str
    step: int
    """`global_steps` when it was saved."""
    last_verified_step: int
    """Newest step whose checks had all reported when it was saved."""
    world_size: int
    zero_stage: int
    """0 to 3."""
    latest: bool
    """Whether the script wanted `latest` to name it."""
    created_at: float
    """Seconds since the Unix epoch."""
    files: Mapping[str, FileEntry]
    """By path relative to the tag's directory, with slashes; `<node>:<path>` for a file of one node."""
    schema_version: int = SCHEMA_VERSION
    algorithm: str = ALGORITHM


class ProblemKind(enum.StrEnum):
    """How a file differs from its entry."""

    MISSING = "missing"
    SIZE = "size"
    CHECKSUM = "checksum"
    EXTRA = "extra"
    UNREADABLE = "unreadable"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One file that is not as the manifest says."""

    kind: ProblemKind
    path: str
    detail: str
    """In words, with the file's name."""

    @property
    def fatal(self) -> bool:
        """Whether the checkpoint must not be loaded. A stray file counts only if DeepSpeed might load it."""
        return self.kind is not ProblemKind.EXTRA or is_loaded(self.path)


def is_loaded(path: str) -> bool:
    """Whether DeepSpeed would load a file of this name from the tag's directory, wherever it came from."""
    return "/" not in path and path.endswith(_LOADED_SUFFIXES)


def serialise(manifest: Manifest) -> str:
    """The manifest as JSON with its own checksum, keys sorted."""
    body = dataclasses.asdict(manifest)
    return json.dumps({**body, "checksum": _checksum(body)}, indent=1, sort_keys=True) + "\n"


def parse(text: str, *, source: str) -> Manifest:
    """Read a manifest back.

    Args:
        text: what `serialise` wrote.
        source: what to call it in an error.

    Raises:
        CheckpointError: it is damaged, or of another version.
    """
    try:
        body = json.loads(text)
    except ValueError:
        raise CheckpointError(f"{source}: the manifest is torn or damaged (not JSON)") from None
    if not isinstance(body, dict):
        raise CheckpointError(f"{source}: the manifest is damaged (not an object)")
    version = body.get("schema_version")
    if version != SCHEMA_VERSION:
        raise CheckpointError(f"{source}: the manifest has version {version!r}; this package reads {SCHEMA_VERSION}")
    checksum = body.pop("checksum", None)
    if checksum != _checksum(body):
        raise CheckpointError(f"{source}: the manifest is damaged (its own checksum differs)")
    try:
        manifest = _from_body(body)
    except (TypeError, AttributeError) as error:
        raise CheckpointError(f"{source}: the manifest lacks something ({error})") from None
    _refuse_strays(manifest, source)
    return manifest


def compare(manifest: Manifest, found: Mapping[str, FileEntry], *, node: str | None = None) -> tuple[Problem, ...]:
    """Hold what was found against the manifest, in the order of the names.

    Args:
        manifest: what should be there.
        found: what is there, by relative path.
        node: the node that looked; files of other nodes are left out.
    """
    expected = visible(manifest, node)
    problems = [_difference(path, entry, found.get(path)) for path, entry in expected.items()]
    problems += [_extra(path) for path in found if path not in expected]
    return tuple(sorted((p for p in problems if p is not None), key=lambda problem: problem.path))


def visible(manifest: Manifest, node: str | None) -> dict[str, FileEntry]:
    """The entries that `node` can see, by relative path, in the order of the names."""
    entries = {}
    for key, entry in sorted(manifest.files.items()):
        if entry.node is None:
            entries[key] = entry
        elif entry.node == node:
            entries[key.removeprefix(f"{node}:")] = entry
    return entries


def fingerprint(manifest: Manifest) -> str:
    """What the manifests that one save wrote on several nodes have in common, and those of two saves have not."""
    return _checksum({key: [entry.size, entry.digest, entry.node] for key, entry in manifest.files.items()})


def assign(sizes: Mapping[str, int], index: int, count: int) -> tuple[str, ...]:
    """The files that worker `index` of `count` hashes: all workers get about as many bytes, and the same answer."""
    loads = [0] * count
    mine = []
    for path, size in sorted(sizes.items(), key=lambda item: (-item[1], item[0])):
        lightest = loads.index(min(loads))
        loads[lightest] += size + 1  # so that empty files spread as well
        if lightest == index:
            mine.append(path)
    return tuple(sorted(mine))


def describe(problems: Iterable[Problem]) -> str:
    """The problems as one phrase: the first in full, the others counted."""
    all_of_them = list(problems)
    more = f" (and {len(all_of_them) - 1} more)" if len(all_of_them) > 1 else ""
    return all_of_them[0].detail + more


def _difference(path: str, expected: FileEntry, found: FileEntry | None) -> Problem | None:
    if found is None:
        return Problem(kind=ProblemKind.MISSING, path=path, detail=f"{path} is missing")
    if found.size != expected.size:
        detail = f"{path} has {found.size} bytes, not {expected.size}"
        return Problem(kind=ProblemKind.SIZE, path=path, detail=detail)
    if found.digest != expected.digest:
        return Problem(
            kind=ProblemKind.CHECKSUM, path=path, detail=f"{path} has another checksum than when it was saved"
        )
    return None


def _extra(path: str) -> Problem:
    return Problem(kind=ProblemKind.EXTRA, path=path, detail=f"{path} is not in the manifest")


def _checksum(body: Mapping[str, Any]) -> str:
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _from_body(body: Mapping[str, Any]) -> Manifest:
    files = {path: FileEntry(**entry) for path, entry in body["files"].items()} if "files" in body else None
    if files is None:
        raise TypeError("files")
    return Manifest(**{**body, "files": files})


def _refuse_strays(manifest: Manifest, source: str) -> None:
    for key, entry in manifest.files.items():
        path = PurePosixPath(key.removeprefix(f"{entry.node}:") if entry.node is not None else key)
        if path.is_absolute() or ".." in path.parts:
            raise CheckpointError(f"{source}: the manifest names {key!r}, which is outside of the checkpoint")
