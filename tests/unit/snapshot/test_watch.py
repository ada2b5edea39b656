"""What a guardian publishes, what it takes back, and that nothing counts which changed while it was hashed."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from resilience.events import SnapshotFact, SnapshotKind
from resilience.snapshot import arena as arenas
from resilience.snapshot import holds as holds_module
from resilience.snapshot import watch as watch_module
from resilience.snapshot.arena import Arena
from resilience.snapshot.hashing import hash_part, verify_file
from resilience.snapshot.holds import HASHING, RESTORE, Holds, read_holds
from resilience.snapshot.inventory import read_inventory, read_manifest
from resilience.snapshot.manifest import Commit, Hold, Part
from resilience.snapshot.orders import Begin
from resilience.snapshot.watch import Watch
from tests.nodes import eventually, write_snapshot

RANKS = (0, 1)


class Watched:
    """An arena, and the thread that watches it."""

    def __init__(self, tmp_path: Path) -> None:
        self.arena, _ = arenas.make(tmp_path, run_id="run", node="here", run_dir=tmp_path)
        self.facts: list[SnapshotFact] = []
        self.holds = Holds(self.arena)
        self.watch = self._new()
        order = Begin(generation=1, world_size=2, ranks=RANKS, peers=(), source=None)
        with self.watch.paused():
            self.watch.begin(order)
        self.watch.start()

    def _new(self) -> Watch:
        return Watch(self.arena, run_id="run", node="here", holds=self.holds, tell=self.facts.append)

    def start_again(self) -> None:
        self.watch.stop()
        self.facts.clear()
        self.watch = self._new()
        self.watch.start()

    def write(self, step: int, ranks: tuple[int, ...] = RANKS, sequence: int = 1) -> list[Commit]:
        return write_snapshot(
            self.arena, step=step, ranks=ranks, world_size=2, sizes=[5_000], sequence=sequence, seed=sequence
        )

    def published(self) -> list[int]:
        return [copy.step for copy in read_inventory(self.arena)]


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Watched]:
    made = Watched(tmp_path)
    yield made
    made.watch.stop()


def assert_matches(arena: Arena, step: int) -> None:
    manifest = read_manifest(arena, step, 1)
    assert manifest is not None
    for part in manifest.parts:
        for entry in part.commit.files:
            verify_file(arena.slot(part.commit.rank, part.commit.slot) / entry.path, entry)


def test_a_snapshot_counts_when_all_ranks_have_committed_it(watched: Watched) -> None:
    watched.write(3, ranks=(0,))
    assert watched.watch.settle(10)
    assert watched.published() == []
    watched.write(3, ranks=(1,))
    eventually(lambda: watched.published() == [3], "the manifest")
    assert_matches(watched.arena, 3)
    (fact,) = watched.facts
    assert (fact.kind, fact.step, fact.num_bytes, fact.clean_through) == (SnapshotKind.TAKEN, 3, 10_000, 3)
    eventually(lambda: read_holds(watched.arena) == (), "nothing held")


def test_what_changed_while_it_was_hashed_does_not_count(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def overwritten_meanwhile(commit: Commit, slot: Path, trail: Path, *, wanted: Callable[[], bool]) -> Part:
        part = hash_part(commit, slot, trail)
        if commit.rank == 1 and not seen:
            assert [(hold.step, hold.why) for hold in read_holds(watched.arena)] == [(3, HASHING)]
            seen.append(commit.step)
            watched.write(3, sequence=2)
        return part

    monkeypatch.setattr(watch_module, "hash_part", overwritten_meanwhile)
    watched.write(3)
    eventually(lambda: watched.published() == [3], "the manifest")
    manifest = read_manifest(watched.arena, 3, 1)
    assert manifest is not None
    assert {part.commit.sequence for part in manifest.parts} == {2}
    assert_matches(watched.arena, 3)
    assert len(watched.facts) == 1


def test_a_manifest_goes_with_its_slots(watched: Watched) -> None:
    commits = watched.write(3)
    eventually(lambda: watched.published() == [3], "the manifest")
    watched.arena.commit(1, commits[1].slot).unlink()
    assert watched.published() == [], "at once, for whoever reads"
    eventually(lambda: watched.arena.published() == [], "its end")


def test_a_file_that_is_not_as_committed_is_refused_once(watched: Watched) -> None:
    commits = watched.write(3, ranks=(0,))
    path = watched.arena.slot(0, commits[0].slot) / commits[0].files[0].path
    path.write_bytes(path.read_bytes()[:-1])
    watched.write(3, ranks=(1,))
    eventually(lambda: bool(watched.facts), "a fact")
    assert watched.watch.settle(10)
    assert watched.watch.settle(10)
    (fact,) = watched.facts
    assert (fact.kind, fact.step) == (SnapshotKind.REFUSED, 3)
    assert "has 4999 bytes, not 5000" in fact.reason
    assert watched.published() == []


def test_one_that_starts_again_takes_up_what_was_published(watched: Watched) -> None:
    watched.write(3)
    eventually(lambda: watched.published() == [3], "the manifest")
    inode = watched.arena.manifest(3, 1).stat().st_ino
    watched.start_again()
    assert [(fact.kind, fact.step) for fact in watched.facts] == [(SnapshotKind.TAKEN, 3)]
    watched.write(4)  # it knows the ranks without being told again
    eventually(lambda: watched.published() == [3, 4], "the next manifest")
    assert watched.arena.manifest(3, 1).stat().st_ino == inode, "hashed once"


def test_what_was_prepared_goes_when_all_ranks_went_on(watched: Watched) -> None:
    watched.holds.add(Hold(2, RESTORE, 1))
    watched.arena.restore(1).mkdir()
    watched.write(3, ranks=(0,))
    assert watched.watch.settle(10)
    assert watched.arena.restore(1).exists()
    watched.write(3, ranks=(1,))
    eventually(lambda: not watched.arena.restore(1).exists(), "its end")
    eventually(lambda: not watched.holds.has(RESTORE), "the end of the hold")


def test_a_full_file_system_keeps_back_what_is_published_and_nothing_else(
    watched: Watched, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    tries: list[Path] = []

    def full(path: Path, content: bytes) -> None:
        tries.append(path)
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(watch_module, "write_atomically", full)
        watched.write(3)
        eventually(lambda: len(tries) >= 3, "some tries")
        assert watched.published() == []
        assert watched.facts == [], "nobody is told of what is not published"
    eventually(lambda: watched.published() == [3], "the manifest, once there is room")
    assert_matches(watched.arena, 3)
    assert [(fact.kind, fact.step) for fact in watched.facts] == [(SnapshotKind.TAKEN, 3)]
    assert capfd.readouterr().err.count("No space left") == 1, "said once"
    eventually(lambda: read_holds(watched.arena) == (), "nothing held")


def test_a_full_file_system_keeps_no_hold_from_being_let_go(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hold that stays for ever would leave the ranks no slot."""

    def full(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(holds_module, "write_atomically", full)
        watched.write(3)
        assert watched.watch.settle(10)
        assert watched.published() == [], "not hashed without a hold"
    eventually(lambda: watched.published() == [3], "the manifest")
    eventually(lambda: read_holds(watched.arena) == (), "nothing held")


def test_a_new_generation_is_watched_although_it_cannot_be_written_down(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    order = Begin(generation=2, world_size=1, ranks=(0,), peers=(), source=None)
    with monkeypatch.context() as patch:
        patch.setattr(watch_module, "write_atomically", full)
        with pytest.raises(OSError, match="No space"), watched.watch.paused():
            watched.watch.begin(order)
    watched.write(3)
    assert watched.watch.settle(10)
    assert watched.published() == [], "these are ranks of the generation before"
