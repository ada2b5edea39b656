"""The command in this process, and a run that has ended for it to look at."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from resilience.cli.main import main
from resilience.coordinator.journal import Journal, decode_fact
from resilience.coordinator.machine import commands as c
from resilience.coordinator.machine.effects import Record
from resilience.events import Check, CheckpointFact, CheckpointKind, DetectionKind
from resilience.testing import FakeRun

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """Run one verb: its exit code, what it printed, what it complained about."""

    def command(*arguments: str) -> tuple[int, str, str]:
        code = main(arguments)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return command


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, with state of its own and 80 columns."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("COLUMNS", "80")
    return tmp_path


@pytest.fixture
def ended(here: Path) -> FakeRun:
    """A run that has ended: one fault mended, one replayed, a rank killed, and its journal in ./resilience-runs."""
    run = FakeRun()
    run.start()
    run.script.at(step=2).alarms(site="attention.scores", kind=DetectionKind.INF, mended=True, bit_exact=True)
    run.script.at(step=3, rank=1).alarms(site="gradient", check=Check.NORM, kind=DetectionKind.NORM_SPIKE)
    run.train(until=4)
    saved = CheckpointFact(
        kind=CheckpointKind.PUBLISHED,
        directory=str(here / "ck"),
        tag="global_step4",
        step=4,
        generation=1,
        last_verified_step=4,
    )
    run.report("rank:0", checkpoints=(saved,))
    run.restart(from_step=4, exits=[run.exit_of(1, -9)])
    run.train(until=6)
    run.submit(c.Close(reason="the test is over"))
    _write(run, here / "resilience-runs" / "20260101-000000-1")
    (here / "resilience-runs" / "latest").symlink_to("20260101-000000-1")
    return run


def _write(run: FakeRun, run_dir: Path) -> None:
    run_dir.mkdir(parents=True)
    content = {"address": "127.0.0.1:9", "metrics_address": None, "pid": 1, "token_file": None, "run_id": "run"}
    (run_dir / "coordinator.json").write_text(json.dumps(content))
    with Journal.open(run_dir / "journal.db") as journal:
        journal.append([Record(decode_fact(kind, body, where="test"), at) for kind, body, at in run.journal])
