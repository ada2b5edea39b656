"""Snapshots on disk: whole or not there, the same step of all nodes, nothing over what a newer generation wrote."""

from __future__ import annotations

import dataclasses
import errno
import os
import threading
from pathlib import Path

import pytest

from resilience.checkpoint.publish import LATEST, publish, read_latest, read_manifest
from resilience.checkpoint.verify import State, inspect, verify
from resilience.config import SnapshotConfig
from resilience.events import SnapshotFact, SnapshotKind
from resilience.snapshot import arena as arenas
from resilience.snapshot.flush import FLUSH, Flusher
from resilience.snapshot.holds import Holds, read_holds
from resilience.snapshot.manifest import Manifest
from tests.nodes import eventually, write_snapshot
from tests.nodes import publish as publish_snapshot


class Node:
    """A node with one rank of two, and its flusher."""

    def __init__(self, tmp_path: Path, rank: int, *, world_size: int = 2, **config: object) -> None:
        self.name = f"worker-{rank}"
        self.rank = rank
        self.world_size = world_size
        self.arena, self._held = arenas.make(tmp_path, run_id="run", node=self.name, run_dir=tmp_path)
        self.newest: Manifest | None = None
        self.facts: list[SnapshotFact] = []
        self.folder = tmp_path / "snapshots"
        self.flusher = Flusher(
            self.arena,
            SnapshotConfig.model_validate({"dir": tmp_path, "flush_interval_s": 0.01, **config}),
            run_id="run",
            run_dir=tmp_path,
            node=self.name,
            holds=Holds(self.arena),
            newest=lambda: self.newest,
            tell=self.facts.append,
        )
        self.flusher.begin(1, (rank,))

    def take(self, step: int, sequence: int = 1) -> None:
        commits = write_snapshot(
            self.arena, step=step, ranks=[self.rank], world_size=self.world_size, sizes=[200_000, 1], sequence=sequence
        )
        self.newest = publish_snapshot(self.arena, self.name, commits)


def flush_all(nodes: list[Node], timeout_s: float = 10.0) -> list[tuple[str, str]]:
    """As on preemption: every node at once."""
    found: dict[int, tuple[str, str]] = {}

    def flush(node: Node) -> None:
        found[node.rank] = node.flusher.flush_now(timeout_s)

    threads = [threading.Thread(target=flush, args=(node,)) for node in nodes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[node.rank] for node in nodes]


def assert_good(folder: Path, step: int) -> None:
    """As a load and `resilience checkpoints verify` would look at it."""
    assert read_latest(folder) == f"global_step{step}"
    manifest = read_manifest(folder / f"global_step{step}")
    assert manifest is not None
    assert (manifest.step, manifest.world_size) == (step, 2)
    assert verify(folder / f"global_step{step}", manifest) == ()
    assert sorted(manifest.files) == sorted(
        [
            *(f"zero_pp_rank_{rank}_{i}.pt" for rank in (0, 1) for i in (0, 1)),
            *(f"resilience/random-rank-{rank:05d}.json" for rank in (0, 1)),
        ]
    )


def test_all_nodes_parts_become_one_checkpoint(tmp_path: Path) -> None:
    nodes = [Node(tmp_path, rank) for rank in (0, 1)]
    for node in nodes:
        node.take(4)
    assert flush_all(nodes) == [(str(tmp_path / "snapshots/global_step4"), "")] * 2
    assert_good(tmp_path / "snapshots", 4)
    facts = [fact for node in nodes for fact in node.facts]
    assert [(fact.kind, fact.step, fact.tier) for fact in facts] == [(SnapshotKind.FLUSHED, 4, "disk")]
    assert not list(tmp_path.glob("snapshots/.flush-*"))
    assert all(read_holds(node.arena) == () for node in nodes)


def test_the_thread_writes_by_itself_and_keeps_the_newest_two(tmp_path: Path) -> None:
    nodes = [Node(tmp_path, rank) for rank in (0, 1)]
    for node in nodes:
        node.flusher.start()
    for step in (1, 2, 3):
        for node in nodes:
            node.take(step)
        eventually(lambda: read_latest(tmp_path / "snapshots") == f"global_step{step}", "it")  # noqa: B023
    for node in nodes:
        node.flusher.stop()
    assert sorted(path.name for path in (tmp_path / "snapshots").iterdir()) == ["global_step2", "global_step3", LATEST]
    assert_good(tmp_path / "snapshots", 3)


def test_without_the_other_nodes_part_nothing_is_published(tmp_path: Path) -> None:
    node = Node(tmp_path, 0)
    node.take(4)
    path, problem = node.flusher.flush_now(0.2)
    assert (path, problem) == ("", "the snapshot of step 4 could not be written within 0 s")
    assert read_latest(tmp_path / "snapshots") is None
    assert not (tmp_path / "snapshots/global_step4").exists()
    # The next generation begins anew.
    other = Node(tmp_path, 1)
    other.take(4)
    for each in (node, other):
        each.flusher.begin(2, (each.rank,))
    flush_all([node, other])
    assert_good(tmp_path / "snapshots", 4)
    assert not list(tmp_path.glob("snapshots/.flush-*"))


def test_a_full_disk_costs_one_line_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nodes = [Node(tmp_path, rank) for rank in (0, 1)]
    for node in nodes:
        node.take(3)
    flush_all(nodes)

    def full(self: Flusher, source: Path, target: Path) -> None:
        target.write_bytes(b"the beginning")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))

    with monkeypatch.context() as patch:
        patch.setattr(Flusher, "_copy", full)
        nodes[0].take(4)
        assert nodes[0].flusher.flush_now(0.5)[0] == ""
    assert capsys.readouterr().err.count("No space left on device") == 1
    assert sorted(path.name for path in (tmp_path / "snapshots").iterdir()) == ["global_step3", LATEST]
    assert_good(tmp_path / "snapshots", 3)


def test_what_was_damaged_in_memory_is_not_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nodes = [Node(tmp_path, rank) for rank in (0, 1)]
    for node in nodes:
        node.take(3)
    manifest = nodes[1].newest
    assert manifest is not None
    path = nodes[1].arena.slot(1, manifest.parts[0].commit.slot) / "state/zero_pp_rank_1_0.pt"
    content = bytearray(path.read_bytes())
    content[70_000] ^= 4
    path.write_bytes(content)
    flush_all(nodes, 1.0)
    assert "record data/0 is not what was hashed" in capsys.readouterr().err
    assert read_latest(tmp_path / "snapshots") is None
    assert not (tmp_path / "snapshots/global_step3").exists()


def test_a_newer_generations_checkpoint_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nodes = [Node(tmp_path, rank) for rank in (0, 1)]
    for node in nodes:
        node.take(3)
    flush_all(nodes)
    folder = tmp_path / "snapshots"
    manifest = read_manifest(folder / "global_step3")
    assert manifest is not None
    publish(folder, dataclasses.replace(manifest, generation=2))
    for node in nodes:
        node.take(3, sequence=2)
    flush_all(nodes, 1.0)
    kept = read_manifest(folder / "global_step3")
    assert kept is not None
    assert kept.generation == 2
    assert "a newer one" in capsys.readouterr().err
    assert_good(folder, 3)


def test_one_that_was_killed_on_the_way_is_seen_to_be_unfinished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = [Node(tmp_path, rank) for rank in (0, 1)]
    for node in nodes:
        node.take(3)

    class Killed(BaseException):
        pass

    def killed(*_: object, **__: object) -> None:
        raise Killed

    nodes[0].flusher._bytes_per_s = None
    nodes[0].flusher._due_at = 0.0
    for node in nodes:
        node.flusher._once()
    with monkeypatch.context() as patch:
        patch.setattr("resilience.snapshot.flush.publish", killed)
        with pytest.raises(Killed):
            nodes[0].flusher._once()
    (found,) = inspect(tmp_path / "snapshots", read_files=True)
    assert (found.tag, found.state, found.good) == ("global_step3", State.UNFINISHED, False)
    flush_all(nodes)
    assert_good(tmp_path / "snapshots", 3)
    assert FLUSH not in {hold.why for node in nodes for hold in read_holds(node.arena)}
