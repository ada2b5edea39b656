"""Arenas: made for their owner alone, refused where somebody else's is, removed when nobody holds them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from resilience.errors import SnapshotError
from resilience.snapshot import arena as arenas
from resilience.snapshot.arena import Arena

HOLDER = """
import sys, pathlib
from resilience.snapshot.arena import make
arena, held = make(pathlib.Path(sys.argv[1]), run_id=sys.argv[2], node="n", run_dir=pathlib.Path("/runs/x"))
print("made", flush=True)
sys.stdin.read()
"""


def holder(directory: Path, run_id: str) -> subprocess.Popen[bytes]:
    """Another process that has made an arena and holds it."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(directory), run_id], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"made\n"
    return process


def end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.communicate()


def test_an_arena_is_for_its_owner_only(tmp_path: Path) -> None:
    arena, held = arenas.make(tmp_path, run_id="r", node="host:1/x", run_dir=tmp_path)
    assert arena.path.name == f"resilience-{os.getuid()}-r-host_1_x"
    assert arena.path.stat().st_mode & 0o777 == 0o700
    owner = arena.owner()
    assert owner is not None
    assert (owner.run_id, owner.node, owner.pid) == ("r", "host:1/x", os.getpid())
    os.close(held)
    arena.remove()
    assert list(tmp_path.iterdir()) == []


def test_one_that_is_held_is_neither_taken_nor_removed(tmp_path: Path) -> None:
    process = holder(tmp_path, "r")
    assert arenas.remove_stale(tmp_path) == []
    with pytest.raises(SnapshotError, match=f"agent pid {process.pid}"):
        arenas.make(tmp_path, run_id="r", node="n", run_dir=tmp_path)
    end(process)
    _, held = arenas.make(tmp_path, run_id="r", node="n", run_dir=tmp_path)
    os.close(held)


def test_those_of_dead_runs_are_removed(tmp_path: Path) -> None:
    dead, alive = holder(tmp_path, "dead"), holder(tmp_path, "alive")
    big = Arena.of(tmp_path, run_id="dead", node="n").slot(0, 0)
    big.mkdir(parents=True)
    (big / "x").write_bytes(b"0" * 1000)
    (tmp_path / f"resilience-{os.getuid()}-no-arena").mkdir()
    end(dead)
    assert arenas.remove_stale(tmp_path) == [f"resilience-{os.getuid()}-dead-n"]
    assert Arena.of(tmp_path, run_id="alive", node="n").path.exists()
    end(alive)


def test_a_run_removes_its_own_only(tmp_path: Path) -> None:
    processes = [holder(tmp_path, "r"), holder(tmp_path, "r-n")]
    assert arenas.remove_run(tmp_path, run_id="r", run_dir=Path("/runs/other")) == []
    assert arenas.remove_run(tmp_path, run_id="r", run_dir=Path("/runs/x")) == [f"resilience-{os.getuid()}-r-n"]
    assert Arena.of(tmp_path, run_id="r-n", node="n").path.exists()
    for process in processes:
        end(process)


def test_what_is_no_arena_of_ours_is_refused(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    Arena.of(tmp_path, run_id="r", node="n").path.symlink_to(elsewhere)
    with pytest.raises(SnapshotError, match="belongs to another user or is no folder"):
        arenas.make(tmp_path, run_id="r", node="n", run_dir=tmp_path)


def test_a_folder_that_is_not_there_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(SnapshotError, match=r"no arena can be made .*snapshot.interval_steps = 0"):
        arenas.make(tmp_path / "none", run_id="r", node="n", run_dir=tmp_path)
    with pytest.raises(SnapshotError, match="cannot be looked at"):
        arenas.room(tmp_path / "none")


def test_room_is_what_file_system_and_memory_both_have(tmp_path: Path) -> None:
    room = arenas.room(tmp_path)
    assert 0 < room.bytes == min(room.free, room.available)


def test_names_are_found_again(tmp_path: Path) -> None:
    arena = Arena(tmp_path)
    for rank, slot in [(3, 0), (0, 1), (0, 0)]:
        arena.state(rank, slot).mkdir(parents=True)
    arena.manifests.mkdir()
    for name in ["10-g1.json", "9-g2.json", "9-g1.json", ".9-g3.json.77", "x.json"]:
        (arena.manifests / name).touch()
    assert (arena.ranks(), arena.slots(0), arena.slots(3), arena.slots(4)) == ([0, 3], [0, 1], [0], [])
    assert arena.published() == [(9, 1), (10, 1), (9, 2)]
