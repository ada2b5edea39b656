"""This rank's memory snapshots: when, into which slot, and the word that it is whole.

The copy is made at the end of `engine.step()`, by all ranks for the same steps. A slot's `commit.json` goes before its
first byte is overwritten, and comes back when the last one is in: who finds it knows that the slot was whole.
Never here: digests, peers, disks; they are the guardian's.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from resilience.checkpoint import randomness
from resilience.clock import Clock, SystemClock
from resilience.config import SnapshotConfig
from resilience.deepspeed.snapshot_take import Taker, counters
from resilience.errors import SnapshotError
from resilience.guard.rng import RngSource
from resilience.guard.settings import Settings
from resilience.snapshot import slots
from resilience.snapshot.archive import Image
from resilience.snapshot.arena import Arena, room, write_atomically
from resilience.snapshot.holds import read_holds
from resilience.snapshot.interval import Pace
from resilience.snapshot.inventory import read_commits
from resilience.snapshot.manifest import STATE, Commit, serialise_commit

__all__ = ["RankSnapshots", "num_slots"]

_DEFAULT_SLOTS, _DEFAULT_SLOTS_WITH_PARITY = 4, 6


def num_slots(config: SnapshotConfig, *, keeps_parity: bool) -> int:
    """Slots of each rank: the configured number, or one more than what is kept at the same time."""
    if config.slots is not None:
        return config.slots
    return _DEFAULT_SLOTS_WITH_PARITY if keeps_parity else _DEFAULT_SLOTS


class RankSnapshots:
    """Implements `resilience.guard.memory.Snapshots` for one rank.

    Args:
        engine: a DeepSpeedEngine.
        arena: of this node.
        settings: this rank.
        world_size: ranks of the generation.
        num_local_ranks: ranks of this node, which share its memory.
        keeps_parity: whether nodes keep parity for each other.
        rng: further generator states.
        trail_bytes: size of the trail now; 0 where none is kept.
        on_off: told once why no snapshots are taken any more.
        clock: for blocking times.
    """

    def __init__(
        self,
        engine: Any,
        arena: Arena,
        settings: Settings,
        *,
        world_size: int,
        num_local_ranks: int,
        keeps_parity: bool,
        rng: RngSource,
        trail_bytes: Callable[[], int] = lambda: 0,
        on_off: Callable[[str], None] = lambda reason: None,
        clock: Clock | None = None,
    ) -> None:
        config = settings.config.snapshot
        self._engine = engine
        self._arena = arena
        self._settings = settings
        self._world_size = world_size
        self._num_local_ranks = num_local_ranks
        self._rng = rng
        self._trail_bytes = trail_bytes
        self._on_off = on_off
        self._clock = clock or SystemClock()
        self._taker = Taker(engine)
        fixed = None if config.interval_steps == "auto" else config.interval_steps
        self._pace = Pace(
            fixed,
            budget_ratio=config.overhead_budget_ratio,
            seconds_between_failures=config.mtbf_hours * 3600.0,
        )
        self._slots: dict[int, int | None] = dict.fromkeys(range(num_slots(config, keeps_parity=keeps_parity)))
        for (rank, slot), commit in read_commits(arena).items():
            if rank == settings.rank and slot in self._slots:
                self._slots[slot] = commit.step  # of an earlier generation; the guardian dropped what is void
        self._newest = max((step for step in self._slots.values() if step is not None), default=None)
        self._clean_through = 0
        self._next: int | None = None
        self._sequence = 0
        self._is_off = False
        self._step_began_at: float | None = None
        self.blocked_s = 0.0
        """Seconds that training waited for copies, in all."""

    @property
    def arena(self) -> Arena:
        """Where they lie."""
        return self._arena

    @property
    def can_take(self) -> bool:
        if self._is_off:
            return False
        held = {hold.step for hold in read_holds(self._arena)}
        self._next = slots.choose(self._slots, newest_whole=self._newest, clean_through=self._clean_through, held=held)
        return self._next is not None

    def wants(self, step: int) -> bool:
        now = self._clock.monotonic()
        if self._step_began_at is not None:
            self._pace.step_took(now - self._step_began_at)
        self._step_began_at = now
        return self._pace.is_due(step)

    def take(self, step: int, *, clean_through: int) -> None:
        self._clean_through = clean_through
        slot = self._next
        assert slot is not None, "the boundary asked first"
        began_at = self._clock.monotonic()
        images = self._taker.collect()
        folder = self._arena.slot(self._settings.rank, slot)
        is_laid_out = self._taker.is_laid_out(folder, images)
        try:
            if not is_laid_out:
                self._make_room(images)
            self._fill(slot, folder, images, step, began_at)
        except (SnapshotError, OSError) as error:
            # The other ranks learn of it at the next boundary, and take no more; what was whole stays.
            self._slots[slot] = None
            self.turn_off(str(error))
            return
        blocked_s = self._clock.monotonic() - began_at
        self.blocked_s += blocked_s
        self._pace.taken(step, blocked_s, is_typical=is_laid_out)
        if self._step_began_at is not None:
            self._step_began_at += blocked_s

    def rewound(self, step: int) -> None:
        """The engine went back to the snapshot of this step: later ones hold the damage."""
        for slot, at in self._slots.items():
            if at is not None and at > step:
                self._arena.commit(self._settings.rank, slot).unlink(missing_ok=True)
                self._slots[slot] = None
        self._newest = max((at for at in self._slots.values() if at is not None), default=None)
        self._clean_through = min(self._clean_through, step)
        self._step_began_at = None
        self._pace.starts_at(step)

    def steps(self) -> list[int]:
        """Steps of the snapshots of this rank that are whole."""
        return sorted(step for step in self._slots.values() if step is not None)

    def turn_off(self, reason: str) -> None:
        """Take no more; said once."""
        if not self._is_off:
            self._is_off = True
            self._on_off(reason)

    def close(self) -> None:
        """Let the arena go."""
        self._is_off = True
        self._taker.close()

    def _make_room(self, images: dict[str, Image]) -> None:
        """See that what is to be laid out fits, for all ranks of the node and all slots that are to come.

        Raises:
            SnapshotError: it does not.
        """
        size = sum(len(image.pickled) + sum(n for _, n in image.sizes) for image in images.values())
        num_missing = sum(1 for step in self._slots.values() if step is None)
        needed = size * max(1, num_missing) * self._num_local_ranks
        there = room(self._arena.path)
        if needed <= there.bytes:
            return
        fits = there.bytes // (size * self._num_local_ranks) if size else 0
        raise SnapshotError(
            f"{self._arena.path}: {len(self._slots)} slots for {self._num_local_ranks} ranks need"
            f" {needed / 2**20:.0f} MiB more, and {there.bytes / 2**20:.0f} MiB are left: {fits} more slots would fit;"
            " set snapshot.slots (at least 3), enlarge /dev/shm, or turn snapshots off (snapshot.interval_steps = 0)"
        )

    def _fill(self, slot: int, folder: Path, images: dict[str, Image], step: int, began_at: float) -> None:
        commit_path = self._arena.commit(self._settings.rank, slot)
        commit_path.unlink(missing_ok=True)
        (folder / STATE).mkdir(parents=True, exist_ok=True)
        files = self._taker.fill(folder, images)
        self._sequence += 1
        commit = Commit(
            run_id=self._settings.run_id,
            generation=self._settings.generation,
            step=step,
            rank=self._settings.rank,
            world_size=self._world_size,
            slot=slot,
            sequence=self._sequence,
            at=self._clock.wall(),
            clean_through=self._clean_through,
            blocked_s=self._clock.monotonic() - began_at,
            random=randomness.capture(self._rng.rng_states()),
            counters=counters(self._engine),
            trail_bytes=self._trail_bytes(),
            files=files,
        )
        write_atomically(commit_path, serialise_commit(commit))
        self._slots[slot], self._newest = step, step
