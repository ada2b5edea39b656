"""A rank's slots: what is whole stays whole whatever happens to the one that is being written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from resilience.config import Config
from resilience.errors import SnapshotError
from resilience.guard import snapshots as module
from resilience.guard.settings import Settings
from resilience.guard.snapshots import RankSnapshots
from resilience.snapshot.arena import Arena, Room, make, write_atomically
from resilience.snapshot.inventory import read_commits
from resilience.snapshot.manifest import Hold, serialise_holds


class Engine:
    """As much of a DeepSpeedEngine as saving asks for."""

    def __init__(self) -> None:
        self.checkpoint_engine: Any = object()
        self.has_moe_layers = False
        self.micro_steps = self.global_steps = self.global_samples = self.skipped_steps = 0
        self.weight = torch.zeros(100)

    def save_checkpoint(self, save_dir: str, tag: str, save_latest: bool) -> None:
        self.checkpoint_engine.save({"weight": self.weight}, f"{save_dir}{tag}/model.pt")

    def rng_states(self) -> dict[str, torch.Tensor]:
        return {}

    def set_rng_states(self, states: dict[str, torch.Tensor]) -> None:
        raise AssertionError("nothing is loaded here")


class Rank:
    """One rank, its arena, and what it said."""

    def __init__(self, directory: Path, **config: Any) -> None:
        self.arena, _ = make(directory, run_id="run", node="here", run_dir=directory)
        self.config = config
        self.said: list[str] = []
        self.engine = Engine()
        self.snapshots = self.start(generation=1)

    def start(self, generation: int) -> RankSnapshots:
        """The rank of a generation; it finds what the one before has left."""
        settings = Settings(
            run_id="run",
            generation=generation,
            rank=0,
            node="here",
            device="here/0",
            config=Config.model_validate({"snapshot": {"interval_steps": 1, **self.config}}),
        )
        return RankSnapshots(
            self.engine,
            Arena(self.arena.path),
            settings,
            world_size=1,
            num_local_ranks=1,
            keeps_parity=False,
            rng=self.engine,
            on_off=self.said.append,
        )

    def take(self, step: int, clean_through: int = 0) -> bool:
        self.engine.global_steps = step
        self.engine.weight.fill_(step)
        if not self.snapshots.can_take:
            return False
        self.snapshots.take(step, clean_through=clean_through)
        return True

    def held(self) -> dict[int, float]:
        """Step → a weight, of each snapshot that has its commit."""
        found = {}
        for (rank, slot), commit in read_commits(self.arena).items():
            (entry,) = commit.files
            value = torch.load(self.arena.slot(rank, slot) / entry.path)["weight"]
            assert torch.equal(value, value[:1].expand(100)), "torn"
            found[commit.step] = float(value[0])
        return found


@pytest.fixture
def rank(tmp_path: Path) -> Rank:
    return Rank(tmp_path)


def test_each_slot_holds_the_state_of_its_step(rank: Rank) -> None:
    for step in range(1, 12):
        assert rank.take(step, clean_through=max(0, step - 2))
        held = rank.held()
        assert held == {at: float(at) for at in held}
        assert step in held
        assert step < 3 or step - 2 in held, "the newest that is known to be clean"
    assert rank.said == []


def test_a_rank_that_dies_within_a_copy_leaves_what_was_whole(rank: Rank, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in range(1, 6):
        rank.take(step)
    before = rank.held()

    class Killed(BaseException):
        pass

    def cut_short(folder: Path, images: Any) -> Any:
        victim = next((folder / "state").iterdir())
        victim.write_bytes(b"torn")
        raise Killed

    monkeypatch.setattr(rank.snapshots._taker, "fill", cut_short)
    with pytest.raises(Killed):
        rank.take(6)
    after = rank.held()
    assert 6 not in after
    assert len(after) == len(before) - 1
    assert 5 in after
    assert 1 in after, "the candidate, the oldest that is not known to be clean yet"
    # The next one finds them, and writes to the torn slot first.
    rank.snapshots = rank.start(generation=2)
    assert rank.snapshots.steps() == sorted(after)
    monkeypatch.undo()
    assert rank.take(7)
    assert rank.held() == {**after, 7: 7.0}


def test_a_commit_that_is_torn_is_none(rank: Rank) -> None:
    rank.take(1)
    rank.take(2)
    path = rank.arena.commit(0, 1)
    path.write_bytes(path.read_bytes()[:-20])
    assert list(rank.held()) == [1]
    assert rank.start(generation=2).steps() == [1]


def test_what_the_guardian_holds_is_not_overwritten(tmp_path: Path) -> None:
    rank = Rank(tmp_path, slots=3)
    for step in (1, 2, 3):
        rank.take(step, clean_through=step)
    write_atomically(rank.arena.holds, serialise_holds([Hold(1, "flush", 1), Hold(2, "parity", 1)]))
    assert not rank.take(4, clean_through=4)
    assert sorted(rank.held()) == [1, 2, 3]
    write_atomically(rank.arena.holds, serialise_holds([Hold(2, "parity", 1)]))
    assert rank.take(5, clean_through=4)
    assert sorted(rank.held()) == [2, 3, 5]


def test_a_full_file_system_turns_snapshots_off_and_keeps_those_that_are_whole(
    rank: Rank, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank.take(1)
    monkeypatch.setattr(module, "room", lambda path: Room(free=100, available=1 << 30))
    rank.take(2)
    assert not rank.snapshots.can_take
    assert len(rank.said) == 1
    assert "MiB are left" in rank.said[0]
    assert "snapshot.slots" in rank.said[0]
    assert list(rank.held()) == [1]


def test_a_failing_copy_is_said_once(rank: Rank, monkeypatch: pytest.MonkeyPatch) -> None:
    rank.take(1)

    def fail(folder: Path, images: Any) -> Any:
        raise SnapshotError("the file system is full")

    monkeypatch.setattr(rank.snapshots._taker, "fill", fail)
    rank.take(2)
    assert not rank.take(3)
    assert rank.said == ["the file system is full"]
    assert list(rank.held()) == [1]


def test_after_a_rewind_later_snapshots_are_gone(rank: Rank) -> None:
    for step in (1, 2, 3):
        rank.take(step)
    rank.snapshots.rewound(1)
    assert list(rank.held()) == [1]
    assert rank.take(2)
    assert sorted(rank.held()) == [1, 2]
