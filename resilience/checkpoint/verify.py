"""Looking at checkpoints on disk: which there are, and whether their files are as the manifest says.

Reads files as bytes only. Nothing here unpickles, and nothing writes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import os
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PurePath

from resilience.checkpoint.doubt import DOUBT, read_doubt
from resilience.checkpoint.manifest import (
    FileEntry,
    Manifest,
    Problem,
    ProblemKind,
    assign,
    compare,
    is_loaded,
    visible,
)
from resilience.checkpoint.publish import (
    FOLDER,
    MANIFEST,
    MARKER,
    TEMPORARY_PREFIX,
    hash_file,
    read_latest,
    read_manifest,
    read_marker,
)
from resilience.errors import CheckpointError

__all__ = [
    "UNIVERSAL_ORIGIN",
    "Candidate",
    "Inspection",
    "State",
    "candidates",
    "check_plain",
    "fallbacks",
    "in_loading_order",
    "inspect",
    "is_tag_dir",
    "is_universal",
    "list_files",
    "locate",
    "member_files",
    "verify",
]

_OWN = {MANIFEST, MARKER, DOUBT}
_TEMPORARY = f"{FOLDER}/{TEMPORARY_PREFIX}"
_OFFLOADED = "offloaded_tensors"  # where DeepSpeed copies what it keeps on NVMe
_UNIVERSAL = "zero"  # where a universal checkpoint has its parameters, one folder for each
UNIVERSAL_ORIGIN = f"{FOLDER}/origin.json"
"""In a universal checkpoint that this package made: of what."""


class State(enum.StrEnum):
    """What can be said of a checkpoint without reading its files."""

    PUBLISHED = "published"
    """It has a manifest."""
    UNFINISHED = "unfinished"
    """A save began and never ended."""
    DAMAGED = "damaged"
    """Its manifest cannot be read."""
    DOUBTED = "doubted"
    """Damage was found after it was saved, and it may hold it."""
    PLAIN = "plain"
    """DeepSpeed's files without a manifest: saved without this package."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One tag of a save_dir."""

    tag: str
    state: State
    at: float
    """When it was saved, in seconds since the Unix epoch."""
    step: int = 0
    """0 where it cannot be known."""
    generation: int = 0
    """0 where it cannot be known."""
    last_verified_step: int = 0
    latest: bool = True
    """Whether the script wanted `latest` to name it; True where it cannot be known."""
    reason: str = ""
    """Why it must not be loaded; empty where it may be, as far as is known."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """What a look at one checkpoint found."""

    directory: str
    tag: str
    state: State
    step: int
    generation: int
    last_verified_step: int
    latest: bool
    """Whether `latest` names it."""
    num_files: int
    num_bytes: int
    at: float
    """When it was saved, in seconds since the Unix epoch."""
    good: bool
    """Nothing was found wrong with it, as far as was looked."""
    problems: tuple[str, ...]


def list_files(tag_dir: Path) -> dict[str, int]:
    """Sizes in bytes of all files of a checkpoint, by relative path, without the manifest itself."""
    found = {}
    for path in sorted(tag_dir.rglob("*")):
        relative = path.relative_to(tag_dir).as_posix()
        if relative in _OWN or relative.startswith(_TEMPORARY) or not path.is_file():
            continue
        with contextlib.suppress(FileNotFoundError):  # a script may be writing files of its own
            found[relative] = path.stat().st_size
    return found


def member_files(tag_dir: Path) -> dict[str, int]:
    """Those of `list_files` that DeepSpeed or this package loads. The others are the script's own, or of a tag below
    this one: that they change says nothing about the checkpoint."""
    kept = (f"{FOLDER}/", f"{_OFFLOADED}/")
    return {path: size for path, size in list_files(tag_dir).items() if is_loaded(path) or path.startswith(kept)}


def verify(
    tag_dir: Path,
    manifest: Manifest,
    *,
    index: int = 0,
    count: int = 1,
    node: str | None = None,
    leave_out: Callable[[str], bool] = lambda _path: False,
) -> tuple[Problem, ...]:
    """Hold a checkpoint's files against its manifest.

    Args:
        tag_dir: the checkpoint.
        manifest: what should be there.
        index: which of `count` workers this is; together they read every file once.
        count: how many workers share the work.
        node: the node of this worker; files that only other nodes hold are left to them.
        leave_out: says of a path that nobody will load it: it is not looked at.

    Returns:
        What differs, in the order of the names; stray files are reported by worker 0.
    """
    expected = visible(manifest, node)
    sizes = {path: entry.size for path, entry in expected.items() if not leave_out(path)}
    mine = set(assign(sizes, index, count))
    present = list_files(tag_dir)
    found: dict[str, FileEntry] = {}
    unreadable: list[Problem] = []
    for path, size in present.items():
        if path in mine:
            try:
                found[path] = _look(tag_dir / path, size, expected[path])
            except OSError as error:
                detail = f"{path} cannot be read ({error.strerror})"
                unreadable.append(Problem(kind=ProblemKind.UNREADABLE, path=path, detail=detail))
        elif path not in expected and index == 0:
            found[path] = FileEntry(size=size, digest="")
    bad = {problem.path for problem in unreadable}
    others = [p for p in compare(manifest, found, node=node) if _concerns(p, mine) and p.path not in bad]
    return tuple(sorted([*unreadable, *others], key=lambda problem: problem.path))


def _look(path: Path, size: int, expected: FileEntry) -> FileEntry:
    # A wrong size says enough: gigabytes need not be read for it.
    return hash_file(path) if size == expected.size else FileEntry(size=size, digest="")


def _concerns(problem: Problem, mine: set[str]) -> bool:
    return problem.kind is ProblemKind.EXTRA or problem.path in mine


def check_plain(tag_dir: Path, required: Iterable[str]) -> tuple[Problem, ...]:
    """What can be found wrong with files that have no manifest.

    Files of torch's zip format carry a CRC for each record, which torch itself never looks at: a torn file and a
    flipped byte are found. Older formats are only seen to be there.

    Args:
        tag_dir: the checkpoint.
        required: names of the files to look at.
    """
    problems = []
    for name in sorted(required):
        path = tag_dir / name
        if not path.is_file():
            problems.append(Problem(kind=ProblemKind.MISSING, path=name, detail=f"{name} is missing"))
            continue
        damage = _zip_damage(path)
        if damage:
            problems.append(Problem(kind=ProblemKind.CHECKSUM, path=name, detail=f"{name} {damage}"))
    return tuple(problems)


def _zip_damage(path: Path) -> str:
    try:
        with path.open("rb") as file:
            head = file.read(4)
        if not head.startswith(b"PK"):
            return "" if head else "is empty"
        with zipfile.ZipFile(path) as archive:
            record = archive.testzip()
    except (OSError, zipfile.BadZipFile, EOFError) as error:
        return f"is torn or damaged ({error})"
    return f"is damaged (record {record} has another CRC)" if record is not None else ""


def candidates(save_dir: Path, named: str | None = None) -> list[Candidate]:
    """All checkpoints of a save_dir, newest first.

    Args:
        save_dir: where they lie.
        named: a tag that is looked for. One with slashes lies deeper, and so do its siblings.
    """
    found = []
    for parent in {PurePath(), PurePath(named or "").parent}:
        folder = save_dir / parent
        children = [path for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
        children = [path for path in children if not path.name.startswith(TEMPORARY_PREFIX)]
        found += [_candidate(path, (parent / path.name).as_posix()) for path in children]
    return sorted((c for c in found if c is not None), key=lambda c: (c.at, c.step, c.tag), reverse=True)


def in_loading_order(found: list[Candidate], latest: str | None) -> list[Candidate]:
    """The candidates for a load without a tag: what to try, best first.

    `latest` is honoured, so that a person can point it at an older checkpoint; what is newer is looked at before it
    only if it must not be loaded, so that it is named. Where `latest` fails or is missing, the others
    come, newest first, without those that the script never wanted to be `latest`.
    """
    named = next((candidate for candidate in found if candidate.tag == latest), None)
    others = [candidate for candidate in found if candidate is not named and candidate.latest]
    if named is None:
        return others
    newer_and_bad = [c for c in others if c.at >= named.at and c.reason]
    return [*newer_and_bad, named, *(c for c in others if c not in newer_and_bad)]


def fallbacks(found: list[Candidate], tag: str) -> list[Candidate]:
    """The candidates for a load of `tag`: itself, then what was saved before it, newest first; none without it."""
    named = next((candidate for candidate in found if candidate.tag == tag), None)
    if named is None:
        return []
    return [named, *(c for c in found if c is not named and c.latest and c.at <= named.at)]


def _candidate(tag_dir: Path, tag: str) -> Candidate | None:
    if not os.access(tag_dir, os.R_OK | os.X_OK):
        return None  # such as the lost+found of a volume; DeepSpeed could not load it either
    if is_universal(tag_dir):
        return None  # made by ds_to_universal, for load_universal_checkpoint only
    try:
        manifest = read_manifest(tag_dir)
    except CheckpointError as error:
        at = (tag_dir / MANIFEST).stat().st_mtime
        return Candidate(tag=tag, state=State.DAMAGED, at=at, reason=str(error))
    if manifest is not None:
        reason = read_doubt(tag_dir, manifest)
        return Candidate(
            tag=tag,
            state=State.DOUBTED if reason else State.PUBLISHED,
            reason=reason,
            at=manifest.created_at,
            step=manifest.step,
            generation=manifest.generation,
            last_verified_step=manifest.last_verified_step,
            latest=manifest.latest,
        )
    marker = read_marker(tag_dir)
    if marker is not None:
        return Candidate(
            tag=tag,
            state=State.UNFINISHED,
            at=marker.started_at or (tag_dir / MARKER).stat().st_mtime,
            step=marker.step,
            generation=marker.generation,
            reason=f"its save was never finished (begun by generation {marker.generation} of run {marker.run_id})",
        )
    states = [path.stat().st_mtime for path in tag_dir.iterdir() if is_loaded(path.name)]
    return Candidate(tag=tag, state=State.PLAIN, at=max(states)) if states else None


def locate(path: Path) -> Path:
    """The tag's directory that `path` means: itself, or for a save_dir the checkpoint that a load would try first.

    Raises:
        CheckpointError: there is none.
    """
    if is_tag_dir(path) or is_universal(path):
        return path
    latest = read_latest(path)
    order = in_loading_order(candidates(path, latest), latest)
    usable = [candidate for candidate in order if candidate.state in (State.PUBLISHED, State.PLAIN)]
    if not usable:
        raise CheckpointError(f"{path}: no checkpoint there; give a save_dir of save_checkpoint, or one of its tags")
    return path / usable[0].tag


def is_tag_dir(path: Path) -> bool:
    """Whether `path` is one checkpoint, rather than a save_dir of several."""
    return path.is_dir() and _candidate(path, path.name) is not None


def is_universal(path: Path) -> bool:
    """Whether `path` is one checkpoint in the form that any number of ranks can load."""
    return (path / _UNIVERSAL).is_dir()


def inspect(path: Path, *, read_files: bool, node: str | None = None) -> list[Inspection]:
    """Look at the checkpoints of a save_dir, newest first, or at the one in a tag's directory.

    Args:
        path: a save_dir or a tag's directory.
        read_files: whether to hold every file against its checksum, or only to look at manifests.
        node: name of this node, where each node keeps files of its own; if the manifest knows none of that name, the
            one whose files lie here is meant.
    """
    save_dir = path.absolute().parent if is_tag_dir(path) else path
    latest = read_latest(save_dir)
    found = candidates(save_dir, latest)
    chosen = [c for c in found if c.tag == path.absolute().name] if is_tag_dir(path) else found
    return [_inspect(save_dir, candidate, candidate.tag == latest, read_files, node) for candidate in chosen]


def _node_seen(manifest: Manifest, present: Mapping[str, int], node: str | None) -> str | None:
    """A launcher may know this machine by another name (an address, `localhost`) than it has for itself."""
    nodes = sorted({entry.node for entry in manifest.files.values() if entry.node is not None})
    if node in nodes or not nodes:
        return node
    return max(nodes, key=lambda name: len(visible(manifest, name).keys() & present.keys()))


def _inspect(save_dir: Path, candidate: Candidate, is_latest: bool, read_files: bool, node: str | None) -> Inspection:
    tag_dir = save_dir / candidate.tag
    sizes = list_files(tag_dir)
    problems: tuple[Problem, ...] = ()
    if read_files and candidate.state is State.PLAIN:
        problems = check_plain(tag_dir, [name for name in sizes if is_loaded(name)])
    elif read_files and candidate.state in (State.PUBLISHED, State.DOUBTED):
        manifest = read_manifest(tag_dir)
        problems = verify(tag_dir, manifest, node=_node_seen(manifest, sizes, node)) if manifest is not None else ()
    details = [candidate.reason] if candidate.reason else []
    details += [problem.detail for problem in problems if problem.fatal]
    return Inspection(
        directory=str(save_dir),
        tag=candidate.tag,
        state=candidate.state,
        step=candidate.step,
        generation=candidate.generation,
        last_verified_step=candidate.last_verified_step,
        latest=is_latest,
        num_files=len(sizes),
        num_bytes=sum(sizes.values()),
        at=candidate.at,
        good=not details,
        problems=tuple(details),
    )
