"""Prepares what the ranks of a new generation load: a folder that looks like a checkpoint, of files that were verified.

    restore-g<generation>/
      snapshot.json            manifest of all parts that are here
      global_step<S>/…         DeepSpeed's files: those of this node's ranks, and those that all ranks read
      commit-<r>.json          counters and random states of a rank
      trail-<r>.bin            what leads its script forward

Files are hard links into the slots, so that nothing is copied and nothing that happens to a slot's name matters; a hold
keeps ranks from writing into them. The folder appears under its name when it is complete.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Protocol

from resilience.errors import SnapshotError
from resilience.snapshot.arena import Arena, write_atomically
from resilience.snapshot.hashing import verify_file, verify_trail
from resilience.snapshot.inventory import is_still_there, read_commits, read_manifest
from resilience.snapshot.manifest import (
    STATE,
    FileEntry,
    Manifest,
    Part,
    merge,
    serialise_commit,
    serialise_manifest,
)
from resilience.snapshot.orders import Begin, Source

__all__ = ["SNAPSHOT", "Remote", "clear", "is_shared", "prepare", "tag_of"]

SNAPSHOT = "snapshot.json"
_OWN_PREFIXES = ("zero_pp_rank_", "bf16_zero_pp_rank_")
"""DeepSpeed's names for what one rank alone reads; all other files are read by ranks that did not write them."""
_MAX_THREADS = 4


class Remote(Protocol):
    """What the guardians of other nodes hold, or can rebuild."""

    def manifests(self, source: Source) -> list[Manifest]:
        """Their manifests of this snapshot.

        Raises:
            SnapshotError: somebody who is said to hold a part cannot be reached.
        """

    def fetch(self, part: Part, entry: FileEntry, into: Path) -> None:
        """Write a file of a rank's part to `into`.

        Raises:
            SnapshotError: it cannot be had.
        """

    def fetch_trail(self, part: Part, into: Path) -> None:
        """Write the trail of a rank, as long as its commit says.

        Raises:
            SnapshotError: it cannot be had.
        """


def prepare(arena: Arena, order: Begin, *, run_id: str, node: str, remote: Remote | None = None) -> Path:
    """Make the folder for the generation of `order`, from its source.

    Args:
        arena: of this node; no rank runs.
        order: the generation; it has a source.
        run_id: the run.
        node: this node's name.
        remote: the other nodes; None where there are none.

    Returns:
        The folder.

    Raises:
        SnapshotError: one line that says what cannot be had, or differs.
    """
    source = order.source
    assert source is not None
    folder = arena.restore(order.generation)
    building = folder.with_name(f".{folder.name}")
    clear(arena)
    try:
        (building / tag_of(source.step)).mkdir(parents=True)
        _fill(building, arena, order, source, run_id, node, remote)
        building.rename(folder)
    except OSError as error:
        raise SnapshotError(
            f"snapshot of step {source.step}: {error.filename or building} cannot be written ({error.strerror}); "
            "is the file system of snapshot.dir full?"
        ) from None
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return folder


def tag_of(step: int) -> str:
    """DeepSpeed's own name for a checkpoint of this step."""
    return f"global_step{step}"


def is_shared(path: str) -> bool:
    """Whether ranks read this file that did not write it."""
    return not PurePosixPath(path).name.startswith(_OWN_PREFIXES)


def clear(arena: Arena) -> None:
    """Remove every prepared folder, finished or not."""
    with contextlib.suppress(OSError):
        for entry in arena.path.iterdir():
            if entry.name.lstrip(".").startswith("restore-g"):
                shutil.rmtree(entry, ignore_errors=True)


def _fill(
    folder: Path, arena: Arena, order: Begin, source: Source, run_id: str, node: str, remote: Remote | None
) -> None:
    own = _own_manifest(arena, source, run_id)
    others = [] if remote is None else remote.manifests(source)
    manifests = [*([own] if own is not None else []), *others]
    if not manifests:
        raise SnapshotError(f"{node}: snapshot of step {source.step}, generation {source.generation}, is not here")
    sharing = {p.commit.rank for m in manifests for p in m.parts if any(is_shared(e.path) for e in p.commit.files)}
    merged = merge(manifests, ranks={*order.ranks, *sharing}, node=node)
    local = () if own is None else own.ranks
    jobs = []
    parts = []
    for part in merged.parts:
        is_own = part.commit.rank in order.ranks
        part = part if is_own else _shared_only(part)
        parts.append(part)
        where = arena.slot(part.commit.rank, part.commit.slot) if part.commit.rank in local else None
        jobs += [(part, entry, where) for entry in part.commit.files]
        if is_own:
            write_atomically(folder / f"commit-{part.commit.rank}.json", serialise_commit(part.commit))
            _place_trail(folder, arena, part, remote=None if where is not None else remote)
    with ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1)) as pool:
        for _ in pool.map(lambda job: _place(folder, source, *job, remote=remote), jobs):
            pass
    write_atomically(folder / SNAPSHOT, serialise_manifest(dataclasses.replace(merged, parts=tuple(parts))))


def _own_manifest(arena: Arena, source: Source, run_id: str) -> Manifest | None:
    manifest = read_manifest(arena, source.step, source.generation)
    if manifest is None or manifest.run_id != run_id:
        return None
    commits = read_commits(arena)
    return manifest if all(is_still_there(part, commits) for part in manifest.parts) else None


def _shared_only(part: Part) -> Part:
    """What other ranks read of a rank's part."""
    files = tuple(entry for entry in part.commit.files if is_shared(entry.path))
    return Part(commit=dataclasses.replace(part.commit, files=files, trail_bytes=0), trail="")


def _place(
    folder: Path, source: Source, part: Part, entry: FileEntry, slot: Path | None, *, remote: Remote | None
) -> None:
    """Put one file into the folder, and hold it against its digests."""
    target = folder / tag_of(source.step) / PurePosixPath(entry.path).relative_to(STATE)
    target.parent.mkdir(parents=True, exist_ok=True)
    if slot is not None:
        try:
            verify_file(slot / entry.path, entry)
            os.link(slot / entry.path, target)
            return
        except SnapshotError:
            if remote is None:  # others may be able to rebuild what is damaged here
                raise
    if remote is None:
        raise SnapshotError(f"rank {part.commit.rank}'s {entry.path} is not on this node, and there is no other")
    remote.fetch(part, entry, target)
    verify_file(target, entry)


def _place_trail(folder: Path, arena: Arena, part: Part, *, remote: Remote | None) -> None:
    """Copy what the trail was at the snapshot: the rank of the new generation goes on with the file itself."""
    if not part.commit.trail_bytes:
        return
    target = folder / f"trail-{part.commit.rank}.bin"
    if remote is not None:
        remote.fetch_trail(part, target)
    else:
        _copy_head(arena.trail(part.commit.rank), target, part.commit.trail_bytes)
    verify_trail(target, part)


def _copy_head(source: Path, target: Path, num_bytes: int) -> None:
    try:
        with source.open("rb") as reader, target.open("wb") as writer:
            while num_bytes and (piece := reader.read(min(num_bytes, 1 << 20))):
                writer.write(piece)
                num_bytes -= len(piece)
    except FileNotFoundError:
        raise SnapshotError(f"{source}: the trail is gone") from None
