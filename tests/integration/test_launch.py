"""Launch, restart and end of real processes on one node, with ranks that only meet in collectives."""

from __future__ import annotations

import contextlib
import json
import signal
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.integration.harness import SCRIPTS, Run, launched, wait_for

pytestmark = [pytest.mark.integration, pytest.mark.slow]

COLLECTIVE = SCRIPTS / "collective.py"
LONG = ["--steps", "100000", "--child", "--buffer"]


@contextlib.contextmanager
def collective(directory: Path, *script_args: str, **options: Any) -> Iterator[Run]:
    with launched(directory, script=COLLECTIVE, script_args=list(script_args), **options) as run:
        yield run


def test_a_killed_rank_is_started_again(tmp_path: Path) -> None:
    with collective(tmp_path, "--exit-at", "4", "--exit-code", "-9", "--child", "--buffer") as run:
        assert run.wait() == 0, run.output()
        run.assert_nothing_left()
        output = run.output()
        assert f"rank 0 of 2 generation 1 port {run.master_port}" in output
        assert "rank 1 of 2 generation 2 port" in output
        assert f"rank 1 of 2 generation 2 port {run.master_port}" not in output, "the old port may linger"
        report = run.report()
        assert report["num_generations"] == 2
        assert report["exit_code"] == 0
        logs = run.run_dir / "logs"
        assert "step 4 generation 1" in (logs / "generation-1" / "rank-0.out").read_text()
        assert "rank 1 done" in (logs / "generation-2" / "rank-1.out").read_text()
        assert stat.S_IMODE((run.run_dir / "context.json").stat().st_mode) == 0o600
        assert stat.S_IMODE((run.run_dir / "token").stat().st_mode) == 0o600


def test_an_exception_is_reported_with_its_words_and_ends_in_93(tmp_path: Path) -> None:
    with collective(tmp_path, "--exit-at", "2", "--every-generation") as run:
        assert run.wait() == 93, run.output()
        report = run.report()
        assert report["exit_code"] == 93
        assert "ValueError: bad data: 3" in json.dumps(report["decisions"])
        assert "ValueError: bad data: 3" in run.output(), "the traceback belongs on the console"
        run.assert_nothing_left()


def test_a_code_that_says_what_to_do_is_passed_on(tmp_path: Path) -> None:
    with collective(tmp_path, "--exit-at", "1", "--exit-code", "64") as run:
        assert run.wait() == 64, run.output()
        assert run.report()["num_generations"] == 1
        run.assert_nothing_left()


def test_a_requeued_run_of_the_same_name_begins_anew(tmp_path: Path) -> None:
    name = '[launch]\nrun_id = "job-1"\n'
    with collective(tmp_path, "--exit-at", "1", "--exit-code", "75", resilience=name) as run:
        assert run.wait() == 75, run.output()
    with collective(tmp_path, "--steps", "1", resilience=name) as run:
        assert run.wait() == 0, run.output()
        assert run.report()["num_generations"] == 1
        assert (run.run_dir / "previous" / "job-1" / "report.json").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_everything_even_deaf_ranks(tmp_path: Path, number: signal.Signals) -> None:
    with collective(tmp_path, *LONG, "--deaf") as run:
        run.wait_for_line("step 3 ")
        began = time.monotonic()
        run.process.send_signal(number)
        assert run.wait(30) == 75, run.output()
        assert time.monotonic() - began < 30
        run.assert_nothing_left(5)
        assert run.report()["exit_code"] == 75


def test_kill_of_the_agent(tmp_path: Path) -> None:
    with collective(tmp_path, *LONG) as run:
        run.wait_for_line("step 3 ")
        run.find("resilience.launch.node").kill()
        assert run.wait(30) == 75, run.output()
        run.assert_nothing_left(5)
        assert run.report()["exit_code"] == 75


def test_kill_of_the_runner(tmp_path: Path) -> None:
    with collective(tmp_path, *LONG) as run:
        run.wait_for_line("step 3 ")
        run.process.kill()
        run.process.wait(10)
        run.assert_nothing_left(30)
        assert run.report()["exit_code"] != 0


def test_kill_of_the_coordinator(tmp_path: Path) -> None:
    with collective(tmp_path, "--steps", "200", "--exit-at", "150", "--exit-code", "-9") as run:
        run.wait_for_line("step 3 ")
        first = json.loads((run.run_dir / "coordinator.json").read_text())
        psutil.Process(first["pid"]).kill()

        def again() -> dict[str, Any]:
            found: dict[str, Any] = json.loads((run.run_dir / "coordinator.json").read_text())
            return found if found["pid"] != first["pid"] else {}

        second = wait_for(again, what="another coordinator")
        assert second["address"] == first["address"]
        assert run.wait() == 0, run.output()
        assert "step 149 generation 1" in run.output(), "healthy ranks must not notice"
        assert run.report()["num_generations"] == 2, "the failure after its return is decided as ever"
        run.assert_nothing_left()


def test_options_of_deepspeeds_launcher_go_on_working(tmp_path: Path) -> None:
    """A shell script that starts the ranks itself, without a local rank, with one log for each rank."""
    script = tmp_path / "start.sh"
    script.write_text(
        f'#!/bin/sh\ncase "$*" in *--local_rank*) exit 64;; esac\n"{sys.executable}" -u "{COLLECTIVE}" "$@"\n'
    )
    script.chmod(0o755)
    logs = tmp_path / "each"
    launch_args = ["--no_python", "--no_local_rank", "--enable_each_rank_log", str(logs), "--save_pid"]
    with launched(tmp_path, script=script, launch_args=launch_args, script_args=LONG) as run:
        wait_for(lambda: [p for p in logs.glob("*_rank0.log") if "step 3 " in p.read_text()], what="the log of rank 0")
        assert "step 3 " not in run.output()
        pid_file = Path("/tmp") / f"{run.process.pid}.deepspeed"
        assert psutil.pid_exists(int(pid_file.read_text()))
        # The shell is the rank, what it started is in its session: both must end with the agent.
        run.find("resilience.launch.node").kill()
        assert run.wait(30) == 75
        run.assert_nothing_left(5)
        pid_file.unlink(missing_ok=True)
