"""The ranks of a node as far as its arena can tell, until killed: snapshot after snapshot, each filled with its step.

    python snapshot_writer.py ARENA GENERATION NUM_RANKS NUM_SLOTS FIRST_STEP

Every word of a file is the step, so that a reader sees a torn one without any digest. Ranks go in step, one after the
other here, and overwrite what real ones would.
"""

from __future__ import annotations

import array
import mmap
import sys
import time
from pathlib import Path

from resilience.snapshot import slots
from resilience.snapshot.arena import Arena, write_atomically
from resilience.snapshot.holds import read_holds
from resilience.snapshot.inventory import read_commits
from resilience.snapshot.manifest import Commit, FileEntry, Record, serialise_commit

NUM_WORDS = 40_000
NUM_PIECES = 8


class Rank:
    def __init__(self, arena: Arena, generation: int, rank: int, num_slots: int) -> None:
        self._arena = arena
        self._generation = generation
        self._rank = rank
        self._slots: dict[int, int | None] = dict.fromkeys(range(num_slots))
        for (of, slot), commit in read_commits(arena).items():
            if of == rank:
                self._slots[slot] = commit.step
        self._sequence = 0

    def choose(self, clean_through: int) -> int | None:
        newest = max((step for step in self._slots.values() if step is not None), default=None)
        held = {hold.step for hold in read_holds(self._arena)}
        return slots.choose(self._slots, newest_whole=newest, clean_through=clean_through, held=held)

    def take(self, step: int, slot: int) -> None:
        self._sequence += 1
        self._arena.commit(self._rank, slot).unlink(missing_ok=True)
        path = self._arena.state(self._rank, slot) / f"zero_pp_rank_{self._rank}.pt"
        self._fill(path, step)
        with self._arena.trail(self._rank).open("ab") as trail:
            trail.write(b"%8d" % step)
            size = trail.tell()
        record = Record(name="data/0", offset=64, size=8 * NUM_WORDS - 64)
        commit = Commit(
            run_id="run", generation=self._generation, step=step, rank=self._rank, world_size=2, slot=slot,
            sequence=self._sequence, at=float(step), clean_through=max(0, step - 2), blocked_s=0.0, random={},
            counters={"global_steps": step}, trail_bytes=size,
            files=(FileEntry(path=f"state/{path.name}", size=8 * NUM_WORDS, records=(record,)),),
        )  # fmt: skip
        write_atomically(self._arena.commit(self._rank, slot), serialise_commit(commit))
        self._slots[slot] = step

    def _fill(self, path: Path, step: int) -> None:
        words = (array.array("q", [step]) * NUM_WORDS).tobytes()
        if not path.exists() or path.stat().st_size != len(words):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(words)
            return
        with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
            # Slowly, so that most kills strike in the middle of it.
            for at in range(0, len(words), len(words) // NUM_PIECES):
                mapped[at : at + len(words) // NUM_PIECES] = words[at : at + len(words) // NUM_PIECES]
                time.sleep(0.0005)


def main() -> None:
    arena, (generation, num_ranks, num_slots, step) = Arena(Path(sys.argv[1])), map(int, sys.argv[2:])
    ranks = [Rank(arena, generation, rank, num_slots) for rank in range(num_ranks)]
    while True:
        chosen = [rank.choose(step - 2) for rank in ranks]
        if any(slot is None for slot in chosen):
            time.sleep(0.001)  # as the boundary: nobody takes it
            continue
        step += 1
        for rank, slot in zip(ranks, chosen, strict=True):
            assert slot is not None
            rank.take(step, slot)


if __name__ == "__main__":
    main()
