"""Watches an arena: hashes what all ranks of the node have committed, publishes it, forgets what was overwritten.

Lock-free towards the ranks: a commit that is not the same after hashing as before takes its digests with it. The thread
runs under SCHED_IDLE, so that a node whose cores are all busy gives it what is left, and at full speed once the ranks
have ended.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from resilience.clock import SystemClock
from resilience.errors import SnapshotError
from resilience.events import SnapshotFact, SnapshotKind
from resilience.snapshot.arena import Arena, write_atomically
from resilience.snapshot.hashing import Interrupted, hash_part
from resilience.snapshot.holds import HASHING, RESTORE, Holds
from resilience.snapshot.inventory import is_still_there, read_manifest
from resilience.snapshot.manifest import Commit, Hold, Manifest, Part, parse_commit, serialise_manifest
from resilience.snapshot.orders import Begin

__all__ = ["Watch", "go_back"]

_POLL_S = (0.02, 0.2)
"""Between two looks: the shortest, while things happen, and the longest."""
_FULL_S = 1.0
"""The longest where nothing can be published: each look hashes anew what waits for room."""
_MAX_THREADS = 4
_NUM_SETTLED = 2
"""Newest snapshots that are hashed once the ranks have ended. The ranks of a job are never further apart than one."""

Commits = dict[tuple[int, int], Commit]
Key = tuple[int, int]
"""(generation, step)"""


@dataclasses.dataclass(frozen=True, slots=True)
class _Group:
    """Who must have committed a snapshot before this node's part of it is whole."""

    generation: int
    ranks: frozenset[int]


class Watch:
    """The thread that watches. `begin` tells it which ranks there are."""

    def __init__(
        self, arena: Arena, *, run_id: str, node: str, holds: Holds, tell: Callable[[SnapshotFact], None]
    ) -> None:
        """Watch `arena`; nothing happens before `start`.

        Args:
            arena: of this node.
            run_id: the run; commits of another one are ignored.
            node: this node's name.
            holds: where it is said what must not be overwritten.
            tell: takes what happened; called on the thread.
        """
        self._arena = arena
        self._run_id = run_id
        self._node = node
        self._holds = holds
        self._tell = tell
        self._clock = SystemClock()
        self._group = _read_group(arena)
        self._cache: dict[Path, tuple[tuple[int, int, int], Commit | None]] = {}
        self._published: dict[Key, Manifest] = {}
        self._refused: set[tuple[Key, tuple[int, ...]]] = set()
        self._work = threading.Lock()
        self._wake = threading.Event()
        self._settled = threading.Event()
        self._is_urgent = False
        self._must_wait = False
        self._is_ending = False
        self._has_complained = False
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def start(self) -> None:
        """Take up what an earlier guardian has published, then watch."""
        for step, generation in self._arena.published():
            manifest = read_manifest(self._arena, step, generation)
            if manifest is None:
                self._arena.manifest(step, generation).unlink(missing_ok=True)
            else:
                self._published[generation, step] = manifest
                self._tell(_taken(manifest))
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._is_ending = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout=2.0)

    @property
    def newest(self) -> Manifest | None:
        """The newest snapshot that this node has published and still holds."""
        keys = sorted(self._published)
        return self._published[keys[-1]] if keys else None

    def settle(self, timeout_s: float) -> bool:
        """Hash at full speed what was committed; whether that was done within `timeout_s`."""
        self._settled.clear()
        self._set_urgent(True)
        self._wake.set()
        return self._settled.wait(timeout_s)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Keep the thread from looking and hashing meanwhile."""
        self._must_wait = True
        with self._work:
            self._must_wait = False
            yield

    def begin(self, order: Begin) -> None:
        """From now on these ranks make a snapshot. Call it while paused.

        Raises:
            OSError: the arena takes no more; the order holds all the same.
        """
        self._group = _Group(order.generation, frozenset(order.ranks))
        self._published = {}
        for step, generation in self._arena.published():
            manifest = read_manifest(self._arena, step, generation)
            if manifest is not None:
                self._published[generation, step] = manifest
        self._set_urgent(False)
        # For a guardian that is started again; without it that one publishes nothing of this generation.
        body = {"generation": order.generation, "ranks": sorted(order.ranks)}
        write_atomically(self._arena.generation, json.dumps(body).encode())

    # ------ the thread

    def _run(self) -> None:
        self._set_urgent(False)
        pause_s = _POLL_S[0]
        while not self._is_ending:
            is_busy, was_urgent = True, self._is_urgent
            with self._work, contextlib.suppress(Interrupted):
                is_busy = self._look_if_there_is_room()
            if was_urgent and not is_busy:
                self._settled.set()
            longest_s = _FULL_S if self._has_complained else _POLL_S[1]
            pause_s = _POLL_S[0] if is_busy else min(1.5 * pause_s, longest_s)
            self._wake.wait(pause_s)
            self._wake.clear()

    def _set_urgent(self, is_urgent: bool) -> None:
        """Full speed, or only what nobody else wants of the processors."""
        self._is_urgent = is_urgent
        if (thread := self._thread.native_id) is not None:
            policy = os.SCHED_OTHER if is_urgent else os.SCHED_IDLE
            with contextlib.suppress(OSError):  # a container may forbid it
                os.sched_setscheduler(thread, policy, os.sched_param(0))

    def _look_if_there_is_room(self) -> bool:
        """A full file system keeps manifests from being published, and must not end this thread."""
        try:
            is_busy = self._look()
        except OSError as error:
            if not self._has_complained:
                print(f"resilience: guardian: {error}; snapshots are not published", file=sys.stderr, flush=True)
            self._has_complained = True
            return False
        self._has_complained = False
        return is_busy

    def _look(self) -> bool:
        """Do the most urgent thing there is; False when there was nothing."""
        commits = self._commits()
        self._forget(commits)
        self._release(commits)
        for key, group in self._whole(commits):
            if key in self._published or _identity(key, group) in self._refused:
                continue
            self._hash(key, group)
            return True
        self._holds.drop(HASHING)
        return False

    def _whole(self, commits: Commits) -> list[tuple[Key, list[Commit]]]:
        """Snapshots that every rank of the node has committed, newest first, as many as matter now."""
        by_key: dict[Key, dict[int, Commit]] = {}
        for commit in commits.values():
            if self._group is not None and commit.generation == self._group.generation:
                by_key.setdefault((commit.generation, commit.step), {})[commit.rank] = commit
        ranks = frozenset[int]() if self._group is None else self._group.ranks
        whole = [(key, [each[rank] for rank in sorted(each)]) for key, each in by_key.items() if set(each) == ranks]
        return sorted(whole, key=lambda pair: pair[0], reverse=True)[: _NUM_SETTLED if self._is_urgent else 1]

    def _hash(self, key: Key, group: list[Commit]) -> None:
        self._holds.drop(HASHING)
        self._holds.add(Hold(key[1], HASHING, key[0]))
        try:
            with ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1) if self._is_urgent else 1) as pool:
                parts = list(pool.map(self._hash_part, group))
        except SnapshotError as error:
            if self._is_unchanged(group):
                self._refused.add(_identity(key, group))
                self._tell(_refused(group[0], self._node, str(error), self._clock.wall()))
            return
        manifest = _manifest(parts, self._node, clean_through=max(c.clean_through for c in self._commits().values()))
        if not self._is_unchanged(group):
            return
        write_atomically(self._arena.manifest(key[1], key[0]), serialise_manifest(manifest))
        self._published[key] = manifest
        self._tell(_taken(manifest))

    def _hash_part(self, commit: Commit) -> Part:
        slot, trail = self._arena.slot(commit.rank, commit.slot), self._arena.trail(commit.rank)
        return hash_part(commit, slot, trail, wanted=lambda: self._is_wanted(commit))

    def _is_wanted(self, commit: Commit) -> bool:
        return not (self._is_ending or self._must_wait) and self._is_unchanged([commit])

    def _is_unchanged(self, group: list[Commit]) -> bool:
        return all(self._read(self._arena.commit(commit.rank, commit.slot)) == commit for commit in group)

    def _forget(self, commits: Commits) -> None:
        """Take back the manifests of snapshots that ranks have begun to overwrite."""
        for key, manifest in list(self._published.items()):
            path = self._arena.manifest(key[1], key[0])
            if not path.exists() or not all(is_still_there(part, commits) for part in manifest.parts):
                path.unlink(missing_ok=True)
                del self._published[key]

    def _release(self, commits: Commits) -> None:
        """Once every rank has committed something of its own, it has loaded what was prepared for it."""
        group = self._group
        if group is None or not self._holds.has(RESTORE):
            return
        begun = {commit.rank for commit in commits.values() if commit.generation == group.generation}
        if begun >= group.ranks:
            shutil.rmtree(self._arena.restore(group.generation), ignore_errors=True)
            self._holds.drop(RESTORE)

    # ------ commits

    def _commits(self) -> Commits:
        found = {}
        for rank in self._arena.ranks():
            for slot in self._arena.slots(rank):
                commit = self._read(self._arena.commit(rank, slot))
                if commit is not None and (commit.run_id, commit.rank, commit.slot) == (self._run_id, rank, slot):
                    found[rank, slot] = commit
        return found

    def _read(self, path: Path) -> Commit | None:
        """A commit; parsed again only when the file is another one."""
        try:
            status = path.stat()
            signature = (status.st_ino, status.st_mtime_ns, status.st_size)
            known = self._cache.get(path)
            if known is None or known[0] != signature:
                known = (signature, parse_commit(path.read_bytes(), source=str(path)))
                self._cache[path] = known
        except (OSError, SnapshotError):
            return None
        return known[1]


def go_back(arena: Arena, generation: int, step: int | None) -> None:
    """Drop the snapshots that generations before this one took after `step` (all of them where there is none).

    They belong to a past that the new generation does not go on from. Call it while no rank runs.
    """
    for rank in arena.ranks():
        for slot in arena.slots(rank):
            path = arena.commit(rank, slot)
            try:
                commit = parse_commit(path.read_bytes(), source=str(path))
            except FileNotFoundError:
                continue
            except SnapshotError:
                path.unlink(missing_ok=True)
                continue
            if commit.generation < generation and (step is None or commit.step > step):
                path.unlink(missing_ok=True)
    for at, taken_by in arena.published():
        if taken_by < generation and (step is None or at > step):
            arena.manifest(at, taken_by).unlink(missing_ok=True)


def _identity(key: Key, group: list[Commit]) -> tuple[Key, tuple[int, ...]]:
    return key, tuple(commit.sequence for commit in group)


def _manifest(parts: list[Part], node: str, *, clean_through: int) -> Manifest:
    first = parts[0].commit
    return Manifest(
        run_id=first.run_id,
        generation=first.generation,
        step=first.step,
        world_size=first.world_size,
        node=node,
        at=max(part.commit.at for part in parts),
        clean_through=clean_through,
        parts=tuple(parts),
    )


def _taken(manifest: Manifest) -> SnapshotFact:
    return SnapshotFact(
        kind=SnapshotKind.TAKEN,
        step=manifest.step,
        generation=manifest.generation,
        node=manifest.node,
        world_size=manifest.world_size,
        num_bytes=manifest.num_bytes,
        clean_through=manifest.clean_through,
        seconds=max((part.commit.blocked_s for part in manifest.parts), default=0.0),
        at=manifest.at,
    )


def _refused(commit: Commit, node: str, reason: str, at: float) -> SnapshotFact:
    return SnapshotFact(
        kind=SnapshotKind.REFUSED,
        step=commit.step,
        generation=commit.generation,
        node=node,
        world_size=commit.world_size,
        reason=reason,
        at=at,
    )


def _read_group(arena: Arena) -> _Group | None:
    """What the guardian before this one was told."""
    try:
        body = json.loads(arena.generation.read_text(encoding="utf-8"))
        return _Group(body["generation"], frozenset(body["ranks"]))
    except (OSError, ValueError, KeyError):
        return None
