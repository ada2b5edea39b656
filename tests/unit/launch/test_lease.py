"""The lease: when a launcher counts as gone, and when it must not."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from resilience.launch.lease import FILE_NAME, Holder, Lease, LeaseWatch
from tests.integration.harness import wait_for


class Clock:
    now = 0.0

    def wall(self) -> float:
        return self.now

    def monotonic(self) -> float:
        return self.now


def put(run_dir: Path, **holder: object) -> None:
    (run_dir / FILE_NAME).write_text(json.dumps({"host": "elsewhere", "pid": 1, "count": 1, **holder}))


def watched(run_dir: Path) -> tuple[LeaseWatch, Clock]:
    clock = Clock()
    return LeaseWatch(run_dir, lease_s=10.0, clock=clock), clock


def test_a_renewed_lease_holds_and_a_standing_one_ends(tmp_path: Path) -> None:
    watch, clock = watched(tmp_path)
    for count in range(1, 6):
        put(tmp_path, count=count)
        clock.now += 9.0
        assert watch.ended() is None
    clock.now += 9.0
    assert watch.ended() is None
    clock.now += 2.0
    assert "elsewhere has not renewed its lease for 11 s" in str(watch.ended())


def test_a_released_lease_ends_at_once(tmp_path: Path) -> None:
    watch, clock = watched(tmp_path)
    put(tmp_path)
    assert watch.ended() is None
    (tmp_path / FILE_NAME).unlink()
    clock.now += 1.0
    assert watch.ended() == "the launcher released its lease"


def test_storage_that_does_not_answer_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watch, clock = watched(tmp_path)
    put(tmp_path)
    assert watch.ended() is None

    def away(run_dir: Path) -> Holder | None:
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(Holder, "read", away)
    for _ in range(5):
        clock.now += 60.0
        assert watch.ended() is None
    monkeypatch.undo()
    clock.now += 5.0
    assert watch.ended() is None, "the silence of the storage must not be counted as the launcher's"


def test_a_dead_launcher_on_this_machine_is_noticed_at_once(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    put(tmp_path, host=socket.gethostname(), pid=ended.pid)
    watch, _ = watched(tmp_path)
    assert f"pid {ended.pid}" in str(watch.ended())


def test_ones_own_parent_may_be_silent(tmp_path: Path) -> None:
    put(tmp_path, host=socket.gethostname(), pid=os.getppid())
    watch, clock = watched(tmp_path)
    for _ in range(5):
        clock.now += 100.0
        assert watch.ended() is None, "a suspended launcher must not cost a local run"


def test_a_lease_is_renewed_until_it_is_released(tmp_path: Path) -> None:
    lease = Lease(tmp_path, lease_s=0.05)
    lease.take()
    watcher = LeaseWatch(tmp_path, lease_s=5.0)
    assert watcher.ended() is None
    wait_for(lambda: (holder := Holder.read(tmp_path)) is not None and holder.count > 3, what="renewals")
    holder = Holder.read(tmp_path)
    assert holder is not None
    assert holder.pid == os.getpid()
    lease.release()
    lease.release()
    assert Holder.read(tmp_path) is None
