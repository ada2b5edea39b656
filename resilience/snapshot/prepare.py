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
from collections.abc import Callable, Iterator
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

__all__ = ["OWN_PREFIXES", "SNAPSHOT", "Remote", "clear", "is_shared", "prepare", "tag_of"]

SNAPSHOT = "snapshot.json"
OWN_PREFIXES = ("zero_pp_rank_", "bf16_zero_pp_rank_")
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


def prepare(
    arena: Arena,
    order: Begin,
    *,
    run_id: str,
    node: str,
    remote: Remote | None = None,
    on_damage: Callable[[str], None] = lambda reason: None,
) -> Path:
    """Make the folder for the generation of `order`, from its source.

    Args:
        arena: of this node; no rank runs.
        order: the generation; it has a source.
        run_id: the run.
        node: this node's name.
        remote: the other nodes; None where there are none.
        on_damage: told once of each of this node's own files that is not what it was, whether or not others make up
            for it. Its snapshot is not offered any more.

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
        filling = _Filling(building, arena, source, remote, on_damage)
        filling.fill(order, run_id=run_id, node=node)
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
    return not PurePosixPath(path).name.startswith(OWN_PREFIXES)


def clear(arena: Arena) -> None:
    """Remove every prepared folder, finished or not."""
    with contextlib.suppress(OSError):
        for entry in arena.path.iterdir():
            if entry.name.lstrip(".").startswith("restore-g"):
                shutil.rmtree(entry, ignore_errors=True)


class _Filling:
    """Brings together what one folder needs, from here and from elsewhere."""

    def __init__(
        self, folder: Path, arena: Arena, source: Source, remote: Remote | None, on_damage: Callable[[str], None]
    ) -> None:
        self._folder = folder
        self._arena = arena
        self._source = source
        self._remote = remote
        self._on_damage = on_damage

    def fill(self, order: Begin, *, run_id: str, node: str) -> None:
        """Make everything that the ranks of `order` load."""
        own = _own_manifest(self._arena, self._source, run_id)
        others = [] if self._remote is None else self._remote.manifests(self._source)
        manifests = [*([own] if own is not None else []), *others]
        if not manifests:
            of = f"snapshot of step {self._source.step}, generation {self._source.generation}"
            raise SnapshotError(f"{node}: {of}, is not here any more")
        if manifests[0].run_id != run_id:
            raise SnapshotError(f"snapshot of step {self._source.step} belongs to run {manifests[0].run_id!r}")
        sharing = {p.commit.rank for m in manifests for p in m.parts if any(is_shared(e.path) for e in p.commit.files)}
        merged = merge(manifests, ranks={*order.ranks, *sharing}, node=node)
        local = () if own is None else own.ranks
        parts = tuple(part if part.commit.rank in order.ranks else _shared_only(part) for part in merged.parts)
        jobs = [(part, entry, part.commit.rank in local) for part in parts for entry in part.commit.files]
        with ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1)) as pool:
            list(pool.map(lambda job: self._place(*job), jobs))
        for part in parts:
            if part.commit.rank in order.ranks:
                path = self._folder / f"commit-{part.commit.rank}.json"
                write_atomically(path, serialise_commit(part.commit))
                self._place_trail(part, is_here=part.commit.rank in local)
        write_atomically(self._folder / SNAPSHOT, serialise_manifest(dataclasses.replace(merged, parts=parts)))

    def _place(self, part: Part, entry: FileEntry, is_here: bool) -> None:
        """Put one file into the folder, held against its digests."""
        target = self._folder / tag_of(self._source.step) / PurePosixPath(entry.path).relative_to(STATE)
        target.parent.mkdir(parents=True, exist_ok=True)
        if is_here:
            path = self._arena.slot(part.commit.rank, part.commit.slot) / entry.path
            with self._unless_damaged(part):
                verify_file(path, entry)
                os.link(path, target)
                return
        if self._remote is None:
            raise SnapshotError(f"rank {part.commit.rank}'s {entry.path} is not on this node, and there is no other")
        self._remote.fetch(part, entry, target)
        verify_file(target, entry)

    def _place_trail(self, part: Part, *, is_here: bool) -> None:
        """Copy what the trail was at the snapshot: the rank of the new generation goes on with the file itself."""
        if not part.commit.trail_bytes:
            return
        target = self._folder / f"trail-{part.commit.rank}.bin"
        if is_here:
            with self._unless_damaged(part):
                _copy_head(self._arena.trail(part.commit.rank), target, part.commit.trail_bytes)
                verify_trail(target, part)
                return
        if self._remote is None:
            raise SnapshotError(f"rank {part.commit.rank}'s trail is not on this node, and there is no other")
        self._remote.fetch_trail(part, target)
        verify_trail(target, part)

    @contextlib.contextmanager
    def _unless_damaged(self, part: Part) -> Iterator[None]:
        """Where this node's own file is damaged, never offer it again; raise only if nobody else can have it."""
        try:
            yield
        except SnapshotError as error:
            # Without its commit nobody hashes the slot once more, and takes the damage for what was meant.
            self._arena.commit(part.commit.rank, part.commit.slot).unlink(missing_ok=True)
            self._arena.manifest(part.commit.step, part.commit.generation).unlink(missing_ok=True)
            self._on_damage(str(error))
            if self._remote is None:
                raise


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


def _copy_head(source: Path, target: Path, num_bytes: int) -> None:
    try:
        with source.open("rb") as reader, target.open("wb") as writer:
            while num_bytes and (piece := reader.read(min(num_bytes, 1 << 20))):
                writer.write(piece)
                num_bytes -= len(piece)
    except FileNotFoundError:
        raise SnapshotError(f"{source}: the trail is gone") from None
