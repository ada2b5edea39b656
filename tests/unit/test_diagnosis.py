"""The doctor's looks at things that this machine does not have: each says what is wrong, and what to do."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest

from resilience.diagnosis import machine, software, way
from resilience.diagnosis.findings import Finding, Level
from resilience.testing import FakeClock


@pytest.mark.parametrize(
    ("required", "level", "said"),
    [
        (["pydantic>=2"], Level.OK, "1 packages"),
        (["pydantic<2"], Level.FAIL, "is not <2"),
        (["no-such-package>=1"], Level.FAIL, "no-such-package is missing"),
        (["no-such-package>=1; extra == 'train'", "pydantic"], Level.OK, "1 packages"),
        (["pydantic<2; extra == 'train'"], Level.FAIL, "pydantic"),
        (["pydantic<2; extra == 'dev'", "pydantic"], Level.OK, "1 packages"),
    ],
)
def test_requirements(required: list[str], level: Level, said: str) -> None:
    finding = software._requirements(required)
    assert finding.level is level
    assert said in finding.detail


@pytest.mark.parametrize(
    ("limit", "has_infiniband", "level"),
    [
        (resource.RLIM_INFINITY, True, Level.OK),
        (8 << 20, False, Level.OK),
        (8 << 20, True, Level.WARN),
    ],
)
def test_locked_memory(limit: int, has_infiniband: bool, level: Level) -> None:
    assert machine._locked_memory(limit, has_infiniband=has_infiniband).level is level


def test_huge_pages_that_nobody_uses(tmp_path: Path) -> None:
    assert machine._huge_pages(tmp_path / "nowhere").level is Level.OK
    for size, free in (("hugepages-2048kB", 512), ("hugepages-1048576kB", 0)):
        (tmp_path / size).mkdir()
        (tmp_path / size / "free_hugepages").write_text(f"{free}\n")
    finding = machine._huge_pages(tmp_path)
    assert finding.level is Level.WARN
    assert "1,024 MiB are set apart" in finding.detail


def test_a_state_directory_that_others_may_write_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert machine._state_directory().level is Level.OK
    directory = tmp_path / "resilience"
    directory.chmod(0o777)
    finding = machine._state_directory()
    assert (finding.level, finding.fix) == (Level.WARN, f"chmod go-w {directory}")
    directory.chmod(0o700)
    monkeypatch.setattr(os, "getuid", lambda: directory.stat().st_uid + 1)
    assert "belongs to user" in machine._state_directory().detail


@pytest.mark.parametrize(
    ("text", "levels", "said"),
    [
        (
            "NVIDIA H200, 570.86, Enabled\nNVIDIA H200, 570.86, Enabled\n",
            [Level.OK, Level.OK],
            "570.86, 2 × NVIDIA H200",
        ),
        ("NVIDIA H200, 570.86, Enabled\nNVIDIA H200, 570.86, Disabled\n", [Level.OK, Level.WARN], "570.86, 2 × NVIDIA"),
        ("NVIDIA GeForce, 550.1, [N/A]\n", [Level.OK, Level.OK], "550.1, 1 × NVIDIA GeForce"),
        ("No devices were found\n", [Level.WARN], "lists no GPU"),
    ],
)
def test_gpus(text: str, levels: list[Level], said: str) -> None:
    findings = list(machine._gpus(text))
    assert [finding.level for finding in findings] == levels
    assert said in findings[0].detail


def test_a_driver_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\nexit 9\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    (finding,) = machine._driver()
    assert (finding.level, finding.name) == (Level.FAIL, "GPU driver")
    program.unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert list(machine._driver()) == []


@pytest.mark.parametrize(("ahead_s", "trip_s", "level"), [(1.0, 0.1, "ok"), (-9.0, 0.1, "warn"), (9.0, 20.0, "ok")])
def test_skew_is_told_from_a_slow_answer(ahead_s: float, trip_s: float, level: str) -> None:
    clock = FakeClock()

    def ask() -> float:
        clock.advance(trip_s)
        return clock.wall() - trip_s / 2 + ahead_s

    found = {finding.name: finding for finding in way.looks(ask, "head:1", None, clock)}
    assert found["clock skew"].level == level
    assert f"{ahead_s:+.1f}" in found["clock skew"].detail


def test_a_token_that_others_can_read(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("secret")
    levels: list[Finding] = []
    for mode in (0o600, 0o640):
        token.chmod(mode)
        levels.append(list(way.looks(lambda: 1_000_000.0, "head:1", token, FakeClock()))[-1])
    assert [finding.level for finding in levels] == [Level.OK, Level.WARN]
    assert levels[1].fix == f"chmod 600 {token}"
