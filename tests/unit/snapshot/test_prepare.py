"""What a new generation loads, and everything that keeps it from being made."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from resilience.errors import SnapshotError
from resilience.snapshot import arena as arenas
from resilience.snapshot.arena import Arena, write_atomically
from resilience.snapshot.inventory import read_commits, read_inventory, read_manifest
from resilience.snapshot.manifest import (
    Commit,
    FileEntry,
    Manifest,
    Part,
    parse_commit,
    parse_manifest,
    serialise_commit,
    serialise_manifest,
)
from resilience.snapshot.orders import Begin, Peer, Source
from resilience.snapshot.prepare import SNAPSHOT, clear, prepare
from resilience.snapshot.watch import go_back
from tests.nodes import publish, write_snapshot

RANKS = (0, 1)


def order(step: int = 4, *, ranks: tuple[int, ...] = RANKS, generation: int = 2) -> Begin:
    return Begin(
        generation=generation,
        world_size=2,
        ranks=ranks,
        peers=(),
        source=Source(step=step, generation=1, peers=(Peer(node="here", address="", ranks=RANKS),)),
    )


@pytest.fixture
def arena(tmp_path: Path) -> Arena:
    """With snapshots of the steps 3 and 4, published."""
    made, _ = arenas.make(tmp_path, run_id="run", node="here", run_dir=tmp_path)
    for step in (3, 4):
        publish(made, "here", write_snapshot(made, step=step, ranks=RANKS, world_size=2, sizes=[5_000, 1]))
    return made


def manifest(arena: Arena, step: int = 4) -> Manifest:
    found = read_manifest(arena, step, 1)
    assert found is not None
    return found


def flip(path: Path, at: int = 2_000) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def file_of(arena: Arena, rank: int, name: str, step: int = 4) -> Path:
    part = manifest(arena, step).part(rank)
    return arena.slot(rank, part.commit.slot) / f"state/{name}"


def test_the_folder_looks_like_a_checkpoint(arena: Arena) -> None:
    folder = prepare(arena, order(), run_id="run", node="here")
    assert folder == arena.restore(2)
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    files = sorted(f"global_step4/zero_pp_rank_{rank}_{i}.pt" for rank in RANKS for i in (0, 1))
    assert names == sorted([*files, SNAPSHOT, "commit-0.json", "commit-1.json", "trail-0.bin", "trail-1.bin"])
    prepared = parse_manifest((folder / SNAPSHOT).read_bytes(), source="s")
    assert prepared.parts == manifest(arena).parts
    for rank in RANKS:
        own = manifest(arena).part(rank).commit
        # Linked, not copied; the trail is as long as it was then.
        assert (folder / f"global_step4/zero_pp_rank_{rank}_0.pt").samefile(
            file_of(arena, rank, f"zero_pp_rank_{rank}_0.pt")
        )
        assert (folder / f"trail-{rank}.bin").read_bytes() == arena.trail(rank).read_bytes()[: own.trail_bytes]
        told = parse_commit((folder / f"commit-{rank}.json").read_bytes(), source="c")
        assert (told.counters, told.step) == (own.counters, 4)


@pytest.mark.parametrize("name", ["zero_pp_rank_1_0.pt", "trail-1.bin"], ids=["file", "trail"])
def test_a_flipped_bit_is_refused_and_never_offered_again(arena: Arena, name: str) -> None:
    path = arena.trail(1) if "trail" in name else file_of(arena, 1, name)
    flip(path, at=5)
    told: list[str] = []
    with pytest.raises(SnapshotError, match="not what"):
        prepare(arena, order(), run_id="run", node="here", on_damage=told.append)
    assert len(told) == 1
    assert name in told[0]
    assert not arena.restore(2).exists()
    assert [copy.step for copy in read_inventory(arena)] == [3]
    # Its slot is not hashed again, which would take the damage for what was meant.
    assert all(commit.step != 4 for commit in _commits(arena, 1))


def test_the_next_older_one_serves_after_it(arena: Arena) -> None:
    flip(file_of(arena, 0, "zero_pp_rank_0_0.pt"))
    with pytest.raises(SnapshotError):
        prepare(arena, order(4), run_id="run", node="here")
    assert (prepare(arena, order(3, generation=3), run_id="run", node="here") / "global_step3").is_dir()


def test_missing_files_and_shards_are_named(arena: Arena) -> None:
    file_of(arena, 1, "zero_pp_rank_1_1.pt").unlink()
    with pytest.raises(SnapshotError, match=r"zero_pp_rank_1_1\.pt: cannot be read"):
        prepare(arena, order(4), run_id="run", node="here")
    only = manifest(arena, 3)
    write_atomically(arena.manifest(3, 1), serialise_manifest(dataclasses.replace(only, parts=only.parts[:1])))
    with pytest.raises(SnapshotError, match="no manifest has rank 1's part"):
        prepare(arena, order(3), run_id="run", node="here")
    with pytest.raises(SnapshotError, match="step 7, generation 1, is not here"):
        prepare(arena, order(7), run_id="run", node="here")


def test_what_another_run_or_version_wrote_is_not_taken(arena: Arena) -> None:
    with pytest.raises(SnapshotError, match="is not here"):
        prepare(arena, order(), run_id="another", node="here")
    path = arena.manifest(4, 1)
    path.write_bytes(path.read_bytes().replace(b'"schema":1', b'"schema":2'))
    with pytest.raises(SnapshotError, match="is not here"):
        prepare(arena, order(), run_id="run", node="here")
    assert [copy.step for copy in read_inventory(arena)] == [3]


def test_a_slot_that_was_overwritten_is_not_taken(arena: Arena) -> None:
    write_snapshot(arena, step=4, ranks=[1], world_size=2, sizes=[5_000, 1], sequence=2)
    with pytest.raises(SnapshotError, match="is not here"):
        prepare(arena, order(), run_id="run", node="here")


class Elsewhere:
    """Another node that has everything."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self.fetched: list[str] = []

    def manifests(self, source: Source) -> list[Manifest]:
        return [manifest(self._arena, source.step)]

    def fetch(self, part: Part, entry: FileEntry, into: Path) -> None:
        self.fetched.append(entry.path)
        into.write_bytes((self._arena.slot(part.commit.rank, part.commit.slot) / entry.path).read_bytes())

    def fetch_trail(self, part: Part, into: Path) -> None:
        self.fetched.append("trail")
        into.write_bytes(self._arena.trail(part.commit.rank).read_bytes()[: part.commit.trail_bytes])


def test_what_is_not_here_comes_from_elsewhere(arena: Arena, tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    empty, _ = arenas.make(tmp_path / "b", run_id="run", node="there", run_dir=tmp_path)
    remote = Elsewhere(arena)
    folder = prepare(empty, order(ranks=(1,)), run_id="run", node="there", remote=remote)
    assert sorted(remote.fetched) == ["state/zero_pp_rank_1_0.pt", "state/zero_pp_rank_1_1.pt", "trail"]
    assert parse_manifest((folder / SNAPSHOT).read_bytes(), source="s").ranks == (1,)


def test_what_comes_from_elsewhere_is_verified(arena: Arena, tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    empty, _ = arenas.make(tmp_path / "b", run_id="run", node="there", run_dir=tmp_path)
    flip(file_of(arena, 1, "zero_pp_rank_1_0.pt"))
    with pytest.raises(SnapshotError, match="not what was hashed"):
        prepare(empty, order(ranks=(1,)), run_id="run", node="there", remote=Elsewhere(arena))
    assert not empty.restore(2).exists()


def test_files_that_all_ranks_read_are_on_every_node(tmp_path: Path) -> None:
    made, _ = arenas.make(tmp_path, run_id="run", node="here", run_dir=tmp_path)
    commits = write_snapshot(made, step=4, ranks=RANKS, world_size=2, sizes=[5_000, 1])
    slot = made.slot(0, commits[0].slot)
    (slot / "state/zero_pp_rank_0_1.pt").rename(slot / "state/mp_rank_00_model_states.pt")
    files = (commits[0].files[0], dataclasses.replace(commits[0].files[1], path="state/mp_rank_00_model_states.pt"))
    write_atomically(
        made.commit(0, commits[0].slot),
        serialise_commit(first := dataclasses.replace(commits[0], files=files)),
    )
    publish(made, "here", [first, commits[1]])
    folder = prepare(made, order(ranks=(1,)), run_id="run", node="here")
    assert sorted(path.name for path in (folder / "global_step4").iterdir()) == [
        "mp_rank_00_model_states.pt",
        "zero_pp_rank_1_0.pt",
        "zero_pp_rank_1_1.pt",
    ]
    prepared = parse_manifest((folder / SNAPSHOT).read_bytes(), source="s")
    assert [entry.path for entry in prepared.part(0).commit.files] == ["state/mp_rank_00_model_states.pt"]
    assert not (folder / "trail-0.bin").exists()


def test_what_was_begun_and_killed_is_cleared(arena: Arena) -> None:
    (arena.path / ".restore-g2" / "global_step4").mkdir(parents=True)
    prepare(arena, order(), run_id="run", node="here")
    prepare(arena, order(generation=3), run_id="run", node="here")
    assert sorted(path.name for path in arena.path.glob("*restore*")) == ["restore-g3"]
    clear(arena)
    assert not list(arena.path.glob("*restore*"))


def test_a_past_that_is_not_gone_on_from_is_dropped(arena: Arena) -> None:
    go_back(arena, 2, 3)
    assert [copy.step for copy in read_inventory(arena)] == [3]
    assert {commit.step for commit in _commits(arena, 0)} == {3}
    go_back(arena, 1, None)  # of this generation itself nothing is dropped
    assert [copy.step for copy in read_inventory(arena)] == [3]
    go_back(arena, 2, None)
    assert read_inventory(arena) == []


def _commits(arena: Arena, rank: int) -> list[Commit]:
    return [commit for (of, _), commit in read_commits(arena).items() if of == rank]
