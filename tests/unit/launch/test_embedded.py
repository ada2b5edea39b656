"""An embedded coordinator that ends, or cannot be started, is started again; the run goes on, and says once why."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from resilience.context import RunContext
from resilience.launch import embedded
from resilience.launch.embedded import EmbeddedCoordinator
from resilience.launch.run_directory import RunDirectory
from resilience.testing import FakeClock


def coordinator_of(tmp_path: Path, clock: FakeClock) -> EmbeddedCoordinator:
    directory = RunDirectory(tmp_path / "run")
    directory.make()
    context = RunContext(run_id="r", run_dir=directory.path, coordinator_address="127.0.0.1:1")
    return EmbeddedCoordinator(directory, context, metrics_port=0, clock=clock)


def test_a_full_disk_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = FakeClock()
    coordinator = coordinator_of(tmp_path, clock)
    started: list[Any] = []

    def start(*_: Any, **__: Any) -> Any:
        if len(started) == 1:
            started.append(None)
            raise OSError(28, "No space left on device")
        started.append(SimpleNamespace(pid=1, returncode=1, poll=lambda: 1 if len(started) < 3 else None))
        return started[-1]

    monkeypatch.setattr(embedded, "subprocess", SimpleNamespace(Popen=start, DEVNULL=subprocess.DEVNULL))
    coordinator.start()
    for _ in range(3):
        coordinator.supervise()  # dies, is started in vain
    assert len(started) == 2
    assert "No space left on device); trying again" in capsys.readouterr().err
    clock.advance(10.0)
    coordinator.supervise()
    assert len(started) == 3
    coordinator.supervise()
    assert capsys.readouterr().err == ""


def test_why_it_ended_is_said_once_for_each_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock, reasons = FakeClock(), iter(["", "disk is full", "disk is full", "disk is full", "port is taken"])
    coordinator = coordinator_of(tmp_path, clock)
    coordinator.log.write_text("resilience: of an earlier process\n")

    def start(*_: Any, stderr: Any, **__: Any) -> Any:
        reason = next(reasons)
        stderr.write(b"2026 INFO step 3\n")
        stderr.write(f"resilience: {reason}\n2026 INFO bye\n".encode() if reason else b"")
        return SimpleNamespace(pid=1, returncode=1, poll=lambda: 1)

    monkeypatch.setattr(embedded, "subprocess", SimpleNamespace(Popen=start, DEVNULL=subprocess.DEVNULL))
    coordinator.start()
    for _ in range(4):
        coordinator.supervise()  # it has died
        clock.advance(6.0)
        coordinator.supervise()  # is started again
    coordinator.supervise()
    assert capsys.readouterr().err.splitlines() == [
        "resilience: the coordinator ended with 1; starting it again",
        "resilience: the coordinator ended with 1: disk is full; starting it again",
        "resilience: the coordinator ended with 1: port is taken; starting it again",
    ]
