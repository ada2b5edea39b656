"""Writes memory snapshots to storage that all nodes share, as DeepSpeed checkpoints like any that a script saves.

    <flush_dir>/.flush-<run id>-g<generation>-s<step>-<taken by>/     while it is being written
      <node>.json                   a node's word that its part is on disk, with the digest of each file
      files/…                       what becomes the tag's folder
    <flush_dir>/global_step<S>/     whole: files, random states, manifest (resilience/checkpoint/manifest.py)
    <flush_dir>/latest

The node with rank 0 chooses the snapshot by making the folder; the others add their parts; whoever finds all parts
there renames `files` to the tag and publishes it. A rename has one winner, and publishing is fenced: a generation that
has ended publishes nothing over a newer one's. A full disk costs one line, and what was there stays what it was.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from resilience.checkpoint.manifest import FileEntry as CheckpointFile
from resilience.checkpoint.manifest import Manifest as Checkpoint
from resilience.checkpoint.publish import (
    MARKER,
    TEMPORARY_PREFIX,
    Marker,
    hash_and_flush,
    publish,
    random_states_file,
    read_manifest,
)
from resilience.clock import SystemClock
from resilience.config import SnapshotConfig
from resilience.errors import CheckpointError, FencedError, ResilienceError
from resilience.events import SnapshotFact, SnapshotKind
from resilience.snapshot.arena import Arena, write_atomically
from resilience.snapshot.crc import mend_crcs
from resilience.snapshot.hashing import verify_file
from resilience.snapshot.holds import Holds
from resilience.snapshot.inventory import is_still_there, read_commits
from resilience.snapshot.inventory import read_manifest as read_own_manifest
from resilience.snapshot.manifest import STATE, Hold, Manifest, Part
from resilience.snapshot.prepare import OWN_PREFIXES, tag_of

__all__ = ["FLUSH", "Flusher"]

FLUSH = "flush"
_KEPT = 2
"""Checkpoints of a run that stay: the newest, and one more should that turn out to be bad."""
_POLL_S = 1.0
_CHUNK_BYTES = 1 << 20
_STAGING = re.compile(r"\.flush-(?P<run>.+)-g(?P<generation>\d+)-s(?P<step>\d+)-(?P<taken>\d+)\Z")
_FILES = "files"
_ABANDONED_S = 600.0
"""A folder that got no further for so long is given up: a node that should add its part no longer has it."""


class _Stopped(Exception):
    """The guardian ends, or a new generation begins."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Ranks:
    """Who writes what in the current generation."""

    generation: int
    leads: bool
    """Whether this node has rank 0."""


class Flusher:
    """The thread that writes. `begin` tells it which generation it is; nothing is written before."""

    def __init__(
        self,
        arena: Arena,
        config: SnapshotConfig,
        *,
        run_id: str,
        run_dir: Path,
        node: str,
        holds: Holds,
        newest: Callable[[], Manifest | None],
        tell: Callable[[SnapshotFact], None],
    ) -> None:
        """Nothing happens before `start`.

        Args:
            arena: of this node.
            config: where to, how often, how fast.
            run_id: the run.
            run_dir: its directory.
            node: this node's name.
            holds: where it is said what must not be overwritten.
            newest: the newest snapshot that this node has published.
            tell: takes what happened; called on the thread.
        """
        self._arena = arena
        self._folder = config.flush_dir or run_dir / "snapshots"
        self._interval_s = config.flush_interval_s
        self._bytes_per_s: float | None = config.flush_mib_per_s * (1 << 20)
        self._run_id = run_id
        self._node = node
        self._holds = holds
        self._newest = newest
        self._tell = tell
        self._clock = SystemClock()
        self._since = arena.path.stat().st_ctime  # of this launch: an earlier one of its name had generations, too
        self._due_at = self._clock.monotonic() + self._interval_s
        self._ranks: _Ranks | None = None
        self._said = ""
        self._work = threading.Lock()
        self._stop = threading.Event()
        self._must_wait = False
        self._thread = threading.Thread(target=self._run, name="flush", daemon=True)

    def start(self) -> None:
        """Start the thread, if anything is to be written at all."""
        if self._interval_s > 0:
            self._thread.start()

    def stop(self) -> None:
        """End the thread; what it had begun goes."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(2.0)

    def begin(self, generation: int, ranks: tuple[int, ...]) -> None:
        """A generation is about to begin: what an older one had begun to write is given up."""
        self._must_wait = True
        with self._work:
            self._must_wait = False
            self._ranks = _Ranks(generation, leads=0 in ranks)
            self._holds.drop(FLUSH)

    def flush_now(self, timeout_s: float) -> tuple[str, str]:
        """The run is leaving: write the newest snapshot, as fast as that goes.

        Returns:
            The checkpoint, or why there is none, in words.
        """
        deadline = self._clock.monotonic() + timeout_s
        self._bytes_per_s, self._due_at = None, 0.0
        newest = self._newest()
        if self._ranks is None or newest is None:
            return "", "there is no snapshot to write"
        while self._clock.monotonic() < deadline:
            if self._is_published(newest.step, self._ranks.generation):
                return str(self._folder / tag_of(newest.step)), ""
            self._once()
            self._stop.wait(0.05)
        return "", f"the snapshot of step {newest.step} could not be written within {timeout_s:.0f} s"

    # ------ the thread

    def _run(self) -> None:
        with contextlib.suppress(OSError):  # a container may forbid it
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        while not self._stop.wait(min(_POLL_S, self._interval_s)):
            self._once()

    def _once(self) -> None:
        """Begin or go on with what is to be written, if anything is."""
        with self._work:
            if self._ranks is None or self._must_wait:
                return
            try:
                for staging in self._stagings(self._ranks):
                    self._add_part(staging, self._ranks)
                    self._publish(staging, self._ranks)
            except _Stopped:
                pass
            except FileNotFoundError:
                pass  # the leader has given it up, or published it
            except (OSError, ResilienceError) as error:
                self._complain(error)
            finally:
                self._holds.drop(FLUSH)

    def _stagings(self, ranks: _Ranks) -> list[Path]:
        """The folder that is being filled, made by the leader when it is time."""
        found = []
        for path in self._folder.glob(f".flush-{self._run_id}-g*"):
            match = _STAGING.match(path.name)
            if match is None or match["run"] != self._run_id or int(match["generation"]) > ranks.generation:
                continue
            if int(match["generation"]) == ranks.generation and not self._is_abandoned(path):
                found.append(path)
            elif ranks.leads:
                shutil.rmtree(path, ignore_errors=True)
        if found or not ranks.leads or self._clock.monotonic() < self._due_at:
            return found
        newest = self._newest()
        if newest is None or self._is_published(newest.step, ranks.generation):
            return []
        self._due_at = self._clock.monotonic() + self._interval_s
        name = f".flush-{self._run_id}-g{ranks.generation}-s{newest.step}-{newest.generation}"
        (self._folder / name / _FILES).mkdir(parents=True)
        return [self._folder / name]

    def _is_abandoned(self, staging: Path) -> bool:
        """Whether nothing has come of it for long, or its files were renamed and nobody lived to publish them."""
        try:
            newest = max(path.stat().st_mtime for path in [staging / _FILES, *staging.rglob("*")])
            return self._clock.wall() - newest > _ABANDONED_S
        except FileNotFoundError:
            return True

    def _add_part(self, staging: Path, ranks: _Ranks) -> None:
        """Write this node's files, unless it has done so."""
        word = staging / f"{self._node}.json"
        if word.exists():
            return
        match = _STAGING.match(staging.name)
        assert match is not None
        step, taken = int(match["step"]), int(match["taken"])
        self._holds.add(Hold(step, FLUSH, taken))
        manifest = read_own_manifest(self._arena, step, taken)
        commits = read_commits(self._arena)
        if manifest is None or not all(is_still_there(part, commits) for part in manifest.parts):
            if ranks.leads:
                shutil.rmtree(staging, ignore_errors=True)  # another one is chosen
            return
        files: dict[str, CheckpointFile] = {}
        for part in manifest.parts:
            files |= self._write_part(staging / _FILES, part)
        said = {
            "ranks": manifest.ranks,
            "world_size": manifest.world_size,
            "last_verified_step": min(manifest.step, manifest.clean_through),
            "files": {path: dataclasses.asdict(entry) for path, entry in files.items()},
        }
        write_atomically(word, json.dumps(said).encode())

    def _write_part(self, folder: Path, part: Part) -> dict[str, CheckpointFile]:
        commit, written = part.commit, {}
        for entry in commit.files:
            name = str(PurePosixPath(entry.path).relative_to(STATE))
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            self._copy(self._arena.slot(commit.rank, commit.slot) / entry.path, target)
            verify_file(target, entry)
            mend_crcs(target)
            written[name] = hash_and_flush(target)
        content = {"random": commit.random, "counters": dict(commit.counters)}
        name = random_states_file(commit.rank)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
        return {**written, name: hash_and_flush(folder / name)}

    def _copy(self, source: Path, target: Path) -> None:
        """Copy a file, no faster than is allowed."""
        began_at, done = self._clock.monotonic(), 0
        with source.open("rb", buffering=0) as reader, target.open("wb", buffering=0) as writer:
            while piece := reader.read(_CHUNK_BYTES):
                if self._stop.is_set() or self._must_wait:
                    raise _Stopped
                writer.write(piece)
                done += len(piece)
                if self._bytes_per_s is not None:
                    early_s = done / self._bytes_per_s - (self._clock.monotonic() - began_at)
                    self._stop.wait(max(0.0, early_s))

    def _publish(self, staging: Path, ranks: _Ranks) -> None:
        """If all parts are there make the checkpoint visible. The leader alone does: of two that did it at a time, one
        would put its files in the place of those that the other has just published."""
        if not ranks.leads:
            return
        match = _STAGING.match(staging.name)
        assert match is not None
        words = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(staging.glob("*.json"))]
        covered = {rank for word in words for rank in word["ranks"]}
        if not words or len(covered) < words[0]["world_size"]:
            return
        step, began_at = int(match["step"]), staging.stat().st_mtime
        tag, now = tag_of(step), self._clock.wall()
        files = {path: CheckpointFile(**entry) for word in words for path, entry in word["files"].items()}
        checkpoint = Checkpoint(
            run_id=self._run_id,
            generation=ranks.generation,
            tag=tag,
            step=step,
            last_verified_step=min(word["last_verified_step"] for word in words),
            world_size=words[0]["world_size"],
            zero_stage=_zero_stage(files),
            latest=True,
            created_at=now,
            files=files,
        )
        marker = Marker(run_id=self._run_id, generation=ranks.generation, step=step, started_at=now)
        write_atomically(staging / _FILES / MARKER, json.dumps(dataclasses.asdict(marker)).encode())
        if not self._put(staging / _FILES, tag, ranks):
            return
        publish(self._folder, checkpoint, since=self._since)
        shutil.rmtree(staging, ignore_errors=True)
        self._said = ""
        self._remove_older(step)
        self._tell(
            SnapshotFact(
                kind=SnapshotKind.FLUSHED,
                step=step,
                generation=int(match["taken"]),
                node="",
                tier="disk",
                world_size=checkpoint.world_size,
                num_bytes=sum(entry.size for entry in files.values()),
                clean_through=checkpoint.last_verified_step,
                seconds=now - began_at,
                at=now,
            )
        )

    def _put(self, files: Path, tag: str, ranks: _Ranks) -> bool:
        """Give the files their place, as an unfinished checkpoint; False where they are gone.

        Raises:
            FencedError: a newer generation's checkpoint lies there.
        """
        target = self._folder / tag
        with contextlib.suppress(CheckpointError):
            there = read_manifest(target)
            is_of_this_run = there is not None and there.run_id == self._run_id and there.created_at >= self._since
            if there is not None and is_of_this_run and there.generation > ranks.generation:
                raise FencedError(f"{target} was published by generation {there.generation}, a newer one")
        replaced = files.parent / "replaced"
        with contextlib.suppress(FileNotFoundError):
            target.rename(replaced)
        try:
            files.rename(target)
        except FileNotFoundError:
            with contextlib.suppress(OSError):
                replaced.rename(target)
            return False
        return True

    def _remove_older(self, step: int) -> None:
        """Keep the newest ones that this run has written; what others put here is not touched."""
        own = []
        for path in self._folder.glob("global_step*"):
            with contextlib.suppress(CheckpointError):
                manifest = read_manifest(path)
                if manifest is not None and manifest.run_id == self._run_id and manifest.created_at >= self._since:
                    own.append((manifest.generation, manifest.created_at, path))
        for _, _, path in sorted(own)[:-_KEPT]:
            doomed = path.with_name(f"{TEMPORARY_PREFIX}{path.name}.{os.getpid()}")
            path.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)

    def _is_published(self, step: int, generation: int) -> bool:
        with contextlib.suppress(CheckpointError):
            manifest = read_manifest(self._folder / tag_of(step))
            return manifest is not None and (manifest.run_id, manifest.generation) == (self._run_id, generation)
        return False

    def _complain(self, error: OSError | ResilienceError) -> None:
        """Say once what keeps snapshots from being written; the next one is tried when it is time."""
        reason = f"snapshots cannot be written to {self._folder}: {error}"
        self._due_at = self._clock.monotonic() + self._interval_s
        if self._ranks is not None and self._ranks.leads:
            for staging in self._folder.glob(f".flush-{self._run_id}-g{self._ranks.generation}-*"):
                shutil.rmtree(staging, ignore_errors=True)
        if reason != self._said:
            print(f"resilience: guardian: {reason}", file=sys.stderr, flush=True)
        self._said = reason


def _zero_stage(files: dict[str, CheckpointFile]) -> int:
    """As far as the names tell: those of stages 1 and 2 are the same."""
    sharded = [PurePosixPath(path).name for path in files if PurePosixPath(path).name.startswith(OWN_PREFIXES)]
    if any(name.endswith("model_states.pt") for name in sharded):
        return 3
    return 1 if sharded else 0
