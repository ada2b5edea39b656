"""`resilience calibrate` up to the launch: what the job is given, what is refused, what is printed."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from resilience.abft.calibration import FOLDER, Histogram, load_profile
from resilience.cli.main import main
from resilience.launch import calibrating


class FakeJob:
    """Stands for the process of the launch: keeps its command, leaves a histogram in the run directory."""

    exit_code = 0
    leaves_histogram = True
    command: list[str]
    config: dict[str, Any]

    def __init__(self, command: list[str], **options: Any) -> None:
        FakeJob.command = command
        FakeJob.config = json.loads(Path(command[command.index("--resilience-config") + 1]).read_text())
        run_dir = Path(command[command.index("--resilience-dir") + 1])
        if FakeJob.leaves_histogram:
            histogram = Histogram()
            for _ in range(2_000):
                histogram.add("linear.out", 0.25)
            histogram.write(run_dir / FOLDER / "rank-0.json")

    def wait(self) -> int:
        return FakeJob.exit_code

    def poll(self) -> int:
        return FakeJob.exit_code


@pytest.fixture(autouse=True)
def job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> type[FakeJob]:
    monkeypatch.setattr(FakeJob, "exit_code", 0)
    monkeypatch.setattr(FakeJob, "leaves_histogram", True)
    monkeypatch.setattr(subprocess, "Popen", FakeJob)
    monkeypatch.chdir(tmp_path)
    return FakeJob


def test_the_job_runs_in_shadow_with_everything_checked_and_the_rest_of_the_users_file(
    job: type[FakeJob], tmp_path: Path
) -> None:
    (tmp_path / "mine.toml").write_text(
        'mode = "enforce"\n[detection]\nstrength = "invariants"\nshare = 0.5\nprofile = "old.toml"\n'
        "[policy]\nmax_restarts = 9\n"
    )
    words = ["--num_gpus", "2", "--resilience-config=mine.toml", "train.py", "--lr", "1"]
    assert calibrating.run_calibrating(words, quiet=False) == (0, Path(job.command[7]))
    assert job.command[2] == "resilience.launch"
    assert job.command[8:] == ["--num_gpus", "2", "train.py", "--lr", "1"]
    assert job.config["mode"] == "shadow"
    assert job.config["policy"] == {"max_restarts": 9}
    assert job.config["detection"] == {
        "strength": "invariants",
        "share": 1.0,
        "profile": None,
        "threshold_scale": 1.0,
        "calibrate": True,
    }


def test_the_command_prints_a_table_and_writes_a_profile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["calibrate", "--output", "p.toml", "--safety-factor", "3", "--", "--resilience-dir", "here", "train.py"]
    assert main(line) == 0
    printed = capsys.readouterr().out
    assert "linear.out" in printed
    assert "0 alarms in 2000 checks: below 0.0015 a check" in printed
    assert load_profile(tmp_path / "p.toml") == {"linear.out": 0.75}
    assert (tmp_path / "here" / FOLDER).is_dir()


def test_json_holds_the_counts_and_the_bound(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["calibrate", "--json", "--", "train.py"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["exit_code"] == 0
    (site,) = answer["sites"]
    assert (site["site"], site["num_checks"], site["num_alarms"], site["scale"]) == ("linear.out", 2000, 0, 0.5)
    assert site["false_positive_bound"] == pytest.approx(3 / 2000, rel=3e-3)
    assert sum(site["counts"]) == 2000


def test_a_job_that_fails_gives_its_code_and_no_profile(
    job: type[FakeJob], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job.exit_code = 93
    assert main(["calibrate", "--output", "p.toml", "--", "train.py"]) == 93
    assert "the job ended with 93, so no profile is written" in capsys.readouterr().err
    assert not (tmp_path / "p.toml").exists()


def test_a_job_without_a_single_check_is_an_error(job: type[FakeJob], capsys: pytest.CaptureFixture[str]) -> None:
    job.leaves_histogram = False
    assert main(["calibrate", "--", "train.py"]) == 1
    assert "no rank left a histogram" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["calibrate"], "Missing argument"),
        (["calibrate", "--", "--resilience-config"], "--resilience-config: needs a value"),
        (["calibrate", "--", "--resilience-config", "off.toml", "train.py"], "detection.strength = 'off'"),
        (["calibrate", "--", "--resilience-config", "absent.toml", "train.py"], "absent.toml: cannot be read"),
        (["calibrate", "--safety-factor", "0.5", "--", "train.py"], "--safety-factor"),
    ],
)
def test_what_cannot_be_calibrated_is_refused_in_one_line(
    words: list[str], complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "off.toml").write_text('[detection]\nstrength = "off"\n')
    assert main(words) == 64
    complained = capsys.readouterr().err.strip()
    assert complaint in complained
    assert len(complained.splitlines()) == 1
