"""A rank's slots: what is whole stays whole whatever happens to the one that is being written."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from resilience.config import Config
from resilience.errors import SnapshotError
from resilience.guard import snapshots as module
from resilience.guard.settings import Settings
from resilience.guard.snapshots import RankSnapshots
from resilience.snapshot.arena import Arena, Room, make, write_atomically
from resilience.snapshot.copiers import StreamCopier
from resilience.snapshot.inventory import read_commits
from resilience.snapshot.manifest import Hold, serialise_holds
from resilience.testing import FakeClock
from tests.integration.workers.late_streams import LateStreams


class Engine:
    """As much of a DeepSpeedEngine as saving asks for."""

    def __init__(self) -> None:
        self.checkpoint_engine: Any = object()
        self.has_moe_layers = False
        self.micro_steps = self.global_steps = self.global_samples = self.skipped_steps = 0
        self.weight = torch.zeros(100)
        self.module = torch.nn.ParameterDict({"weight": torch.nn.Parameter(self.weight, requires_grad=False)})
        self.optimizer = SimpleNamespace(state={}, param_groups=[])

    def save_checkpoint(self, save_dir: str, tag: str, save_latest: bool) -> None:
        self.checkpoint_engine.save({"weight": self.weight}, f"{save_dir}{tag}/model.pt")

    def rng_states(self) -> dict[str, torch.Tensor]:
        return {}

    def set_rng_states(self, states: dict[str, torch.Tensor]) -> None:
        raise AssertionError("nothing is loaded here")


class Rank:
    """One rank, its arena, and what it said."""

    def __init__(self, directory: Path, streams: LateStreams | None = None, **config: Any) -> None:
        self.streams, self.waiting, self.lost = streams, list[str](), list[str]()
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
            copier=StreamCopier(self.streams) if self.streams is not None else None,
            on_waiting=self.waiting.append,
            on_lost=self.lost.append,
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


@pytest.fixture
def late(tmp_path: Path) -> Rank:
    """A rank whose device copies when it is waited for."""
    return Rank(tmp_path, LateStreams())


def test_a_snapshot_that_is_being_copied_is_none(late: Rank) -> None:
    for step in (1, 2, 3):
        assert late.take(step, clean_through=step)
        late.snapshots.before_forward()
        assert step not in late.held(), "its commit must not be there before its last byte"
        assert step not in late.snapshots.steps()
        late.snapshots.finish()
        assert late.held()[step] == step
        assert late.snapshots.steps()[-1] == step
    assert late.waiting == []


def test_the_commit_comes_after_the_last_byte(late: Rank, monkeypatch: pytest.MonkeyPatch) -> None:
    assert late.streams is not None
    log = late.streams.log
    monkeypatch.setattr(module, "write_atomically", lambda path, content: log.append(path.name))
    late.take(1)
    late.snapshots.before_forward()
    late.snapshots.finish()
    assert log == ["beside", "wait", "commit.json"]


def test_a_copy_that_is_done_is_a_snapshot_at_the_next_forward(late: Rank) -> None:
    assert late.streams is not None
    late.take(1)
    late.snapshots.before_forward()
    late.snapshots.before_forward()
    assert late.held() == {}, "it is not done"
    late.streams.run()
    late.snapshots.before_forward()
    assert late.held() == {1: 1.0}
    assert "wait" not in late.streams.log
    late.engine.weight.fill_(2.0)
    late.snapshots.finish()
    assert late.snapshots.lost_step == 0, "what is changed later is no business of the copy"


def test_a_rank_that_dies_before_its_copy_is_finished_leaves_no_commit(late: Rank) -> None:
    for step in (1, 2, 3, 4):
        late.take(step)
        late.snapshots.finish()
    late.take(5)
    late.snapshots.before_forward()
    before = late.held()
    assert 5 not in before
    # The next process finds those that were whole, and writes to the torn slot first.
    late.snapshots = late.start(generation=2)
    assert late.snapshots.steps() == sorted(before)
    assert late.take(6)
    late.snapshots.finish()
    assert late.held() == {**before, 6: 6.0}


def test_the_copy_is_waited_for_before_the_next_one_begins(late: Rank) -> None:
    late.take(1)
    late.snapshots.before_forward()
    assert late.snapshots.can_take
    assert late.held() == {1: 1.0}
    late.take(2)
    assert late.held() == {1: 1.0}


def test_a_state_that_was_written_beneath_the_copy_is_no_snapshot(late: Rank) -> None:
    late.take(1)
    late.snapshots.finish()
    late.take(2)
    late.snapshots.before_forward()
    late.engine.weight[50] = 7.0
    late.snapshots.finish()
    assert late.held() == {1: 1.0}
    assert late.snapshots.lost_step == 2
    assert late.lost == ["the state of step 2 was written to while it was copied"]
    assert late.snapshots.steps() == [1]
    late.take(3)
    late.snapshots.finish()
    assert (sorted(late.held()), late.snapshots.lost_step) == ([1, 3], 0)
    assert late.waiting == [], "once may have been damage"


def test_a_script_that_writes_weights_at_each_step_waits_for_its_copies(late: Rank) -> None:
    for step in (1, 2):
        late.take(step)
        late.engine.weight[0] += 1.0
        late.snapshots.finish()
    assert late.held() == {}
    for step in (3, 4):
        late.take(step)
        late.engine.weight[0] += 1.0
        late.snapshots.finish()
    assert late.held() == {3: 3.0, 4: 4.0}
    assert late.waiting == ["something writes weights or optimizer state between the optimizer steps"]


def test_what_one_rank_has_lost_no_rank_counts_on(late: Rank) -> None:
    for step in (1, 2):
        late.take(step)
        late.snapshots.finish()
    late.snapshots.give_up(2)
    assert late.held() == {1: 1.0}
    assert late.snapshots.steps() == [1]


def test_a_rewind_in_the_middle_of_a_copy_leaves_no_trace_of_it(late: Rank) -> None:
    late.take(1)
    late.snapshots.finish()
    late.take(2)
    late.snapshots.before_forward()
    late.snapshots.rewound(1)
    late.engine.weight.fill_(1.0)
    late.snapshots.finish()
    assert late.held() == {1: 1.0}


def test_memory_that_cannot_be_page_locked_is_said_once_and_copied_to_all_the_same(tmp_path: Path) -> None:
    rank = Rank(tmp_path, LateStreams(refuses="cudaHostRegister: not permitted"))
    for step in (1, 2, 3):
        rank.take(step)
        assert rank.held()[step] == step
    assert rank.waiting == ["memory of snapshots cannot be page-locked (cudaHostRegister: not permitted)"]


def test_at_the_end_the_copy_is_finished_and_all_memory_is_unlocked(late: Rank) -> None:
    assert late.streams is not None
    late.take(1)
    late.snapshots.close()
    assert late.held() == {1: 1.0}
    assert late.streams.locked == set()


@pytest.mark.parametrize("is_busy", [False, True], ids=["idle", "busy"])
def test_only_what_the_device_waits_for_counts(late: Rank, monkeypatch: pytest.MonkeyPatch, is_busy: bool) -> None:
    streams, clock = late.streams, FakeClock()
    assert streams is not None
    streams.takes_ms = 2000.0
    late.snapshots._clock = clock
    late.take(1)
    clock.advance(30.0)
    if is_busy:
        # The script's stream is still at work when the copy has ended.
        monkeypatch.setattr(streams, "mark", lambda: streams.beside(lambda: None))
        late.snapshots.before_forward()
        late.snapshots.before_forward()
    late.snapshots.finish()
    assert late.snapshots.blocked_s == (0.0 if is_busy else 2.0)
    (commit,) = read_commits(late.arena).values()
    assert commit.blocked_s == late.snapshots.blocked_s


def test_files_that_hang_in_a_restore_folder_give_no_memory_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank = Rank(tmp_path, slots=3)
    for step in (1, 2, 3):
        rank.take(step, clean_through=step)
    monkeypatch.setattr(module, "room", lambda path: Room(free=100, available=1 << 40))
    # A new process takes the files over and needs nothing more; those that are held elsewhere it cannot have.
    rank.snapshots = rank.start(generation=2)
    assert rank.take(4, clean_through=4)
    assert rank.said == []
    folder = rank.arena.restore(2)
    folder.mkdir()
    for slot in rank.arena.slots(0):
        (path,) = rank.arena.state(0, slot).iterdir()
        (folder / f"{slot}.pt").hardlink_to(path)
    rank.take(5, clean_through=4)
    assert len(rank.said) == 1
    assert "more slots would fit" in rank.said[0]
    assert 4 in rank.held()
