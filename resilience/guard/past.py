"""The snapshots of this node's arena as a rank can go back to them, without leaving its process.

The guardian has hashed them; what is loaded is held against its manifest, the files before and the engine after. Files
that only another node has are not fetched: there is no rewind then. Never here: what is run again afterwards.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from resilience.deepspeed.snapshot_load import load, read_prepared
from resilience.errors import SnapshotError
from resilience.guard.settings import Settings
from resilience.guard.snapshots import RankSnapshots
from resilience.snapshot.inventory import is_still_there, read_commits, read_manifest
from resilience.snapshot.manifest import Manifest
from resilience.snapshot.orders import Begin, Source
from resilience.snapshot.prepare import prepare

__all__ = ["ArenaPast"]

_HASHING_S = 10.0
"""How long a guardian that has the machine to itself is waited for; training stands still meanwhile."""

_POLL_S = 0.02


class ArenaPast:
    """Implements `resilience.guard.memory.Past`.

    Args:
        engine: a DeepSpeedEngine.
        snapshots: what this rank has taken.
        settings: this rank.
        load_checkpoint: DeepSpeed's own, of this engine, as those watch it who must know of edits.
    """

    def __init__(
        self,
        engine: Any,
        snapshots: RankSnapshots,
        settings: Settings,
        load_checkpoint: Callable[..., Any],
    ) -> None:
        self._engine = engine
        self._snapshots = snapshots
        self._arena = snapshots.arena
        self._settings = settings
        self._clock = settings.clock
        self._load_checkpoint = load_checkpoint

    def steps(self) -> list[int]:
        """See `Past.steps`; reads names only."""
        generation = self._settings.generation
        return sorted(step for step, of in self._arena.published() if of == generation)

    def settled_steps(self) -> list[int]:
        """See `Past.settled_steps`."""
        rank, generation = self._settings.rank, self._settings.generation
        commits = read_commits(self._arena)
        own = [c.step for c in commits.values() if (c.rank, c.generation) == (rank, generation)]
        newest, deadline = max(own, default=None), self._clock.monotonic() + _HASHING_S
        # A guardian hashes the newest one first, and never those that it was too late for.
        while newest is not None and newest not in self.steps() and self._clock.monotonic() < deadline:
            time.sleep(_POLL_S)
        found = ((step, self._manifest(step)) for step in self.steps())
        return [
            step
            for step, manifest in found
            if manifest is not None and all(is_still_there(part, commits) for part in manifest.parts)
        ]

    def prepare(self, step: int) -> None:
        """See `Past.prepare`. One rank of the node does it for all."""
        manifest = self._manifest(step)
        if manifest is None:
            raise SnapshotError(f"the manifest of the snapshot of step {step} is gone")
        own = manifest.part(self._settings.rank).commit.files
        if 0 not in manifest.ranks and not any("model_states" in entry.path for entry in own):
            raise SnapshotError("the model file of its snapshot is written by rank 0 only, which is on another node")
        if self._settings.rank == manifest.ranks[0]:
            settings = self._settings
            order = Begin(
                generation=settings.generation,
                world_size=manifest.world_size,
                ranks=manifest.ranks,
                peers=(),
                source=Source(step=step, generation=settings.generation, peers=()),
            )
            prepare(self._arena, order, run_id=settings.run_id, node=settings.node)

    def load(self, step: int) -> Mapping[str, int]:
        """See `Past.load`."""
        folder, rank = self._folder, self._settings.rank
        manifest = read_prepared(folder)
        if manifest.step != step:
            raise SnapshotError(f"{folder}: holds the snapshot of step {manifest.step}, not {step}")
        load(
            self._engine,
            folder,
            manifest,
            rank=rank,
            load_checkpoint=self._load_checkpoint,
            verify_files=False,  # they were, while they were brought together
        )
        if rank == manifest.ranks[0]:
            shutil.rmtree(folder, ignore_errors=True)
        return manifest.part(rank).commit.counters

    def drop_after(self, step: int) -> None:
        """See `Past.drop_after`."""
        self._snapshots.rewound(step)

    @property
    def _folder(self) -> Path:
        return self._arena.restore(self._settings.generation)

    def _manifest(self, step: int) -> Manifest | None:
        manifest = read_manifest(self._arena, step, self._settings.generation)
        is_ours = manifest is not None and manifest.run_id == self._settings.run_id
        return manifest if is_ours and manifest is not None and self._settings.rank in manifest.ranks else None
