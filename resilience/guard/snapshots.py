"""This rank's memory snapshots: when, into which slot, and the word that it is whole.

The copy is made at the end of `engine.step()`, by all ranks for the same steps; on a GPU most of it beside the next
forward and backward, and it is waited for before the next optimizer step: the reduction at that boundary says of all
ranks that they have it. A slot's `commit.json` goes before its first byte is overwritten, and comes back when the
last one is in: who finds it knows that the slot was whole. Never here: digests, peers, disks; they are the guardian's.
"""

from __future__ import annotations

import dataclasses
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
from resilience.snapshot.copiers import Copier
from resilience.snapshot.holds import read_holds
from resilience.snapshot.interval import Pace
from resilience.snapshot.inventory import read_commits
from resilience.snapshot.manifest import STATE, Commit, serialise_commit

__all__ = ["RankSnapshots", "num_slots"]

_DEFAULT_SLOTS, _DEFAULT_SLOTS_WITH_PARITY = 4, 6
_MAX_LOST = 2
"""Snapshots in a row whose state the script changes beneath the copy, before copies are waited for."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Begun:
    """A snapshot that is not whole yet."""

    commit: Commit
    blocked_s: float
    is_laid_out: bool


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
        copier: of what lies on the engine's device; None to copy all at once.
        on_off: told once why no snapshots are taken any more.
        on_waiting: told once why each copy is waited for, where it need not be.
        on_lost: told of each snapshot that came to nothing, and why.
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
        copier: Copier | None = None,
        on_off: Callable[[str], None] = lambda reason: None,
        on_waiting: Callable[[str], None] = lambda reason: None,
        on_lost: Callable[[str], None] = lambda reason: None,
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
        self._on_off, self._on_waiting, self._on_lost = on_off, on_waiting, on_lost
        self._clock = clock or SystemClock()
        self._taker = Taker(engine, copier)
        self._copier = self._taker.copier
        self._begun: _Begun | None = None
        self._num_lost = 0
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
        self._is_off = self._has_told = False
        self._step_began_at: float | None = None
        self.blocked_s = 0.0
        """Seconds that training waited for copies, in all."""
        self.problem = ""
        """Why none are taken any more; empty while they are."""
        self.lost_step = 0
        """Step of the last snapshot, where this rank's copy of it came to nothing; else 0."""

    @property
    def arena(self) -> Arena:
        """Where they lie."""
        return self._arena

    @property
    def interval_steps(self) -> int:
        """Steps between two snapshots, as things stand."""
        return self._pace.interval

    @property
    def can_take(self) -> bool:
        self.finish()
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
        self._clean_through, self.lost_step = clean_through, 0
        slot = self._next
        assert slot is not None, "the boundary asked first"
        began_at = self._clock.monotonic()
        images = self._taker.collect()
        folder = self._arena.slot(self._settings.rank, slot)
        is_laid_out = self._taker.is_laid_out(folder, images)
        try:
            if not is_laid_out:
                self._make_room(slot, images)
            commit = self._fill(slot, folder, images, step)
        except (SnapshotError, OSError) as error:
            self._copier.drop()
            self._fail(str(error))
            return
        if self._copier.problem and not self._has_told:
            self._has_told = True
            self._on_waiting(self._copier.problem)
        blocked_s = self._clock.monotonic() - began_at
        self._begun = _Begun(commit, blocked_s, is_laid_out)
        self._blocked(blocked_s)
        if not self._copier.is_copying:
            self._conclude(self._begun)

    def before_forward(self) -> None:
        if self._begun is None:
            return
        if self._copier.is_done:
            self.finish()
        else:
            began_at = self._clock.monotonic()
            self._copier.go_on()
            blocked_s = self._clock.monotonic() - began_at
            self._begun = dataclasses.replace(self._begun, blocked_s=self._begun.blocked_s + blocked_s)
            self._blocked(blocked_s)

    def finish(self) -> None:
        begun = self._begun
        if begun is None:
            return
        is_same = self._copier.finish()
        waited_s = self._copier.waited_s
        self._blocked(waited_s)
        if is_same:
            self._conclude(dataclasses.replace(begun, blocked_s=begun.blocked_s + waited_s))
        else:
            self._lose(begun)

    def give_up(self, step: int) -> None:
        """The snapshot of this step is not whole on some rank."""
        self._drop(lambda at: at == step)

    def rewound(self, step: int) -> None:
        """The engine went back to the snapshot of this step: later ones hold the damage."""
        if self._begun is not None:
            self._begun = None
            self._copier.drop()
        self._drop(lambda at: at > step)
        self._clean_through = min(self._clean_through, step)
        self._step_began_at = None
        self._pace.starts_at(step)

    def steps(self) -> list[int]:
        """Steps of the snapshots of this rank that are whole."""
        return sorted(step for step in self._slots.values() if step is not None)

    def turn_off(self, reason: str) -> None:
        """Take no more; said once."""
        if not self._is_off:
            self._is_off, self.problem = True, reason
            self._on_off(reason)

    def close(self) -> None:
        """Let the arena go."""
        self.finish()
        self._is_off = True
        self._taker.close()

    # ------

    def _conclude(self, begun: _Begun) -> None:
        """Everything is copied: say so."""
        self._begun, self._num_lost = None, 0
        commit = dataclasses.replace(begun.commit, blocked_s=begun.blocked_s)
        try:
            write_atomically(self._arena.commit(commit.rank, commit.slot), serialise_commit(commit))
        except OSError as error:
            self._fail(str(error))
            return
        self._slots[commit.slot] = self._newest = commit.step
        self._pace.taken(commit.step, begun.blocked_s, is_typical=begun.is_laid_out)

    def _lose(self, begun: _Begun) -> None:
        """Something wrote to the state while it was copied: what the slot holds is of no step."""
        self._begun = None
        self.lost_step = begun.commit.step
        self._on_lost(f"the state of step {self.lost_step} was written to while it was copied")
        self._num_lost += 1
        if self._num_lost >= _MAX_LOST:
            self._copier.wait_from_now_on("something writes weights or optimizer state between the optimizer steps")

    def _fail(self, reason: str) -> None:
        """The other ranks learn of it at the next boundary, and take no more; what was whole stays."""
        self._begun = None
        self.turn_off(reason)

    def _drop(self, is_dropped: Callable[[int], bool]) -> None:
        """Give up the snapshots of some steps."""
        for slot, at in self._slots.items():
            if at is not None and is_dropped(at):
                self._arena.commit(self._settings.rank, slot).unlink(missing_ok=True)
                self._slots[slot] = None
        self._newest = max((at for at in self._slots.values() if at is not None), default=None)

    def _blocked(self, seconds: float) -> None:
        """Training has waited; what a step takes by itself does not count it."""
        self.blocked_s += seconds
        if self._step_began_at is not None:
            self._step_began_at += seconds

    def _make_room(self, slot: int, images: dict[str, Image]) -> None:
        """See that what is to be laid out fits, for all ranks of the node and all slots that are to come.

        Raises:
            SnapshotError: it does not.
        """
        size = sum(len(image.pickled) + sum(n for _, n in image.sizes) for image in images.values())
        to_come = {slot, *(each for each, step in self._slots.items() if step is None)}
        missing = sum(max(0, size - self._own_bytes(each)) for each in to_come)
        needed = missing * self._num_local_ranks
        there = room(self._arena.path)
        if needed <= there.bytes:
            return
        fits = there.bytes // (size * self._num_local_ranks) if size else 0
        raise SnapshotError(
            f"{self._arena.path}: {len(self._slots)} slots for {self._num_local_ranks} ranks need"
            f" {needed / 2**20:.0f} MiB more, and {there.bytes / 2**20:.0f} MiB are left: {fits} more slots would fit;"
            " set snapshot.slots (at least 3), enlarge /dev/shm, or turn snapshots off (snapshot.interval_steps = 0)"
        )

    def _own_bytes(self, slot: int) -> int:
        """Memory of the slot's files that is used again, or given back, when it is laid out: not of those that hang in
        a folder to restore from, too."""
        files = [path.stat() for path in self._arena.state(self._settings.rank, slot).glob("*")]
        return sum(file.st_blocks * 512 for file in files if file.st_nlink == 1)

    def _fill(self, slot: int, folder: Path, images: dict[str, Image], step: int) -> Commit:
        """Copy, or begin to; the word that is to be given when all is there.

        Raises:
            SnapshotError, OSError: there is no room.
        """
        self._slots[slot] = None
        self._arena.commit(self._settings.rank, slot).unlink(missing_ok=True)
        (folder / STATE).mkdir(parents=True, exist_ok=True)
        files = self._taker.fill(folder, images)
        self._sequence += 1
        return Commit(
            run_id=self._settings.run_id,
            generation=self._settings.generation,
            step=step,
            rank=self._settings.rank,
            world_size=self._world_size,
            slot=slot,
            sequence=self._sequence,
            at=self._clock.wall(),
            clean_through=self._clean_through,
            blocked_s=0.0,
            random=randomness.capture(self._rng.rng_states()),
            counters=counters(self._engine),
            trail_bytes=self._trail_bytes(),
            files=files,
        )
