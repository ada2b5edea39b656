"""Making a checkpoint visible: atomic, durable writes and the fence between generations.

The order is: a marker before the first byte, the files, the manifest, the marker away, `latest`. A process that dies
between any two of them leaves a checkpoint that is seen to be unfinished, or a good one that `latest` does not name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path, PurePath

from resilience.checkpoint.manifest import FileEntry, Manifest, parse, serialise
from resilience.errors import CheckpointError, FencedError

__all__ = [
    "FOLDER",
    "LATEST",
    "MANIFEST",
    "MARKER",
    "TEMPORARY_PREFIX",
    "Marker",
    "begin",
    "hash_and_flush",
    "hash_file",
    "publish",
    "random_states_file",
    "read_latest",
    "read_manifest",
    "read_marker",
    "sync_folder",
    "write_atomically",
]

FOLDER = "resilience"
"""Folder below the tag's directory for what this package keeps there."""
MANIFEST = f"{FOLDER}/manifest.json"
MARKER = f"{FOLDER}/saving.json"
LATEST = "latest"
TEMPORARY_PREFIX = ".resilience-"
"""Of files and folders that are being made or deleted."""


def random_states_file(rank: int) -> str:
    """Where a rank's random states and counters are kept, relative to the tag's directory."""
    return f"{FOLDER}/random-rank-{rank:05d}.json"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Marker:
    """A save has begun. Beside no manifest it means that the save never ended."""

    run_id: str
    generation: int
    step: int
    started_at: float
    """Seconds since the Unix epoch."""


def write_atomically(path: Path, content: bytes) -> None:
    """Replace `path` by `content`: readers see the old or the new one, also after a loss of power."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def hash_and_flush(path: Path) -> FileEntry:
    """Size and SHA-256 of a file that was just written, which is on disk when this returns.

    Raises:
        OSError: it cannot be read.
    """
    entry = hash_file(path)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return entry


def hash_file(path: Path) -> FileEntry:
    """Size and SHA-256 of a file.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return FileEntry(size=file.tell(), digest=digest)


def sync_folder(folder: Path) -> None:
    """Make renames and new names in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def begin(save_dir: Path, tag: str, marker: Marker, *, since: float = 0.0) -> None:
    """Mark `tag` as being saved, unless a newer generation of the run has published it.

    Args:
        save_dir: what the script gave.
        tag: the checkpoint's folder in it.
        marker: what to write.
        since: when this process began, in seconds since the Unix epoch. What had been published by then is no newer
            generation's: a run that is launched again under its name counts its generations from 1.

    Raises:
        FencedError: a newer generation has published this tag, or `latest`.
        OSError: the directory cannot be written.
    """
    _refuse_older(save_dir, tag, marker.run_id, marker.generation, since)
    write_atomically(save_dir / tag / MARKER, json.dumps(dataclasses.asdict(marker)).encode())


def publish(save_dir: Path, manifest: Manifest, *, since: float = 0.0) -> None:
    """Write the manifest, take the marker away, and let `latest` name the tag if the script wanted that.

    All files of the checkpoint must be on disk and in the manifest. `since` as for `begin`.

    Raises:
        FencedError: a newer generation has published this tag, or `latest`.
        OSError: the directory cannot be written.
    """
    tag_dir = save_dir / manifest.tag
    with _lock(save_dir):
        _refuse_older(save_dir, manifest.tag, manifest.run_id, manifest.generation, since)
        write_atomically(tag_dir / MANIFEST, serialise(manifest).encode())
        (tag_dir / MARKER).unlink(missing_ok=True)
        above = [save_dir / parent for parent in PurePath(manifest.tag).parents]
        for folder in [*(path for path in tag_dir.rglob("*") if path.is_dir()), tag_dir, *above]:
            sync_folder(folder)
        if manifest.latest:
            write_atomically(save_dir / LATEST, manifest.tag.encode())


def read_latest(save_dir: Path, pointer: str = LATEST) -> str | None:
    """The tag that `latest` (or another pointer) names; None if there is none."""
    try:
        return (save_dir / pointer).read_text(encoding="utf-8").strip() or None
    except (OSError, UnicodeDecodeError):
        return None


def read_manifest(tag_dir: Path) -> Manifest | None:
    """The manifest of a checkpoint; None if it has none.

    Raises:
        CheckpointError: it is there and damaged.
    """
    path = tag_dir / MANIFEST
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: the manifest cannot be read ({error})") from None
    return parse(text, source=str(path))


def read_marker(tag_dir: Path) -> Marker | None:
    """The marker of a save that has not ended; None if there is none. A damaged one still means that one began."""
    try:
        content = json.loads((tag_dir / MARKER).read_text(encoding="utf-8"))
        return Marker(**content)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, TypeError):
        return Marker(run_id="", generation=0, step=0, started_at=0.0)


def _refuse_older(save_dir: Path, tag: str, run_id: str, generation: int, since: float) -> None:
    for published in {tag, read_latest(save_dir)} - {None}:
        try:
            manifest = read_manifest(save_dir / str(published))
        except CheckpointError:
            continue  # a damaged one protects nothing
        if manifest is None or manifest.run_id != run_id or manifest.created_at < since:
            continue
        if manifest.generation > generation:
            raise FencedError(
                f"{save_dir / manifest.tag} was published by generation {manifest.generation} of run {run_id}; "
                f"this process belongs to generation {generation}, which has ended, and publishes nothing any more"
            )


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Hold other publishers off between the fence's look and the rename.

    File systems that cannot lock a directory (some network ones) leave that instant open: the agent has ended the
    older generation's processes by then, and the fence is the second line.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
