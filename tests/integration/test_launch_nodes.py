"""Two nodes on one machine: over a `pdsh` that runs its commands here, and with `--no_ssh`, a runner for each node."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.integration.harness import SCRIPTS, Run, free_port, launched, wait_for

pytestmark = [pytest.mark.integration, pytest.mark.slow]

COLLECTIVE = SCRIPTS / "collective.py"
PDSH = f"""#!{sys.executable}
# What pdsh -S does, with sessions of their own instead of other machines: its death reaches nothing.
import subprocess, sys
hosts = sys.argv[sys.argv.index("-w") + 1]
command = " ".join(sys.argv[sys.argv.index("-w") + 2 :])
nodes = [
    subprocess.Popen(["/bin/bash", "-c", command.replace("%n", str(n))], start_new_session=True)
    for n, _ in enumerate(hosts.split(","))
]
codes = [node.wait() for node in nodes]
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""
FAST_LEASE = "[coordinator]\nlease_s = 4.0\n"


@pytest.fixture
def nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Options for a launch on two nodes with one device each."""
    (tmp_path / "hostfile").write_text("worker-0 slots=1\nworker-1 slots=1\n")
    binaries = tmp_path / "bin"
    binaries.mkdir()
    (binaries / "pdsh").write_text(PDSH)
    (binaries / "pdsh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{binaries}:{os.environ['PATH']}")
    return ["--hostfile", str(tmp_path / "hostfile"), "--num_gpus", "1", "--master_addr", "127.0.0.1", "--no_ssh_check"]


def commands_of(run: Run) -> str:
    return "\n".join(" ".join(process.cmdline()) for process in run.processes())


def test_pdsh_restarts_both_nodes_and_shows_no_secret(tmp_path: Path, nodes: list[str]) -> None:
    script_args = ["--steps", "30", "--exit-at", "20", "--exit-code", "-9", "--child", "--buffer"]
    with launched(tmp_path, script=COLLECTIVE, launch_args=nodes, script_args=script_args) as run:
        run.wait_for_line("step 3 ")
        token = (run.run_dir / "token").read_text()
        commands = commands_of(run)
        assert commands.count("resilience.launch.node --resilience-context") >= 2
        assert token not in commands
        assert run.wait() == 0, run.output()
        assert "rank 1 of 2 generation 2" in run.output()
        report = run.report()
        assert report["num_generations"] == 2
        assert "worker-1" in report["generations"][0]["ended_by"]
        run.assert_nothing_left()


def test_remote_agents_end_when_their_launcher_is_killed(tmp_path: Path, nodes: list[str]) -> None:
    options = {"launch_args": nodes, "script_args": ["--steps", "100000", "--child", "--buffer"]}
    with launched(tmp_path, script=COLLECTIVE, resilience=FAST_LEASE, **options) as run:
        run.wait_for_line("step 3 ")
        run.process.kill()
        run.process.wait(10)
        run.assert_nothing_left(30)


def test_remote_agents_end_on_a_signal(tmp_path: Path, nodes: list[str]) -> None:
    with launched(
        tmp_path, script=COLLECTIVE, launch_args=nodes, script_args=["--steps", "100000", "--child", "--buffer"]
    ) as run:
        run.wait_for_line("step 3 ")
        run.process.terminate()
        assert run.wait(30) == 75, run.output()
        run.assert_nothing_left(5)


def without_ssh(tmp_path: Path, nodes: list[str], node_rank: int) -> list[str]:
    shared = ["--resilience-dir", str(tmp_path / "first" / "run")]
    return [*nodes, "--no_ssh", "--node_rank", str(node_rank), *shared]


def test_two_runners_form_one_run(tmp_path: Path, nodes: list[str]) -> None:
    """The second node's rank is killed: both nodes restart, and both runners end with 0."""
    port = ["--master_port", str(free_port())]
    script_args = ["--steps", "40", "--exit-at", "20", "--exit-code", "-9"]
    first_args, second_args = ([*without_ssh(tmp_path, nodes, n), *port] for n in (0, 1))
    with (
        launched(tmp_path / "second", script=COLLECTIVE, launch_args=second_args, script_args=script_args) as second,
        launched(tmp_path / "first", script=COLLECTIVE, launch_args=first_args, script_args=script_args) as first,
    ):
        assert first.wait() == 0, first.output()
        assert second.wait(30) == 0, second.output()
        assert "rank 0 of 2 generation 2" in first.output()
        assert "rank 1 of 2 generation 2" in second.output()
        assert first.report()["exit_code"] == 0
        first.assert_nothing_left()
        second.assert_nothing_left()


def test_a_runner_ends_with_the_one_that_leads(tmp_path: Path, nodes: list[str]) -> None:
    port = ["--master_port", str(free_port())]
    script_args = ["--steps", "100000", "--child"]
    first_args, second_args = ([*without_ssh(tmp_path, nodes, n), *port] for n in (0, 1))
    with (
        launched(tmp_path / "first", script=COLLECTIVE, launch_args=first_args, script_args=script_args) as first,
        launched(tmp_path / "second", script=COLLECTIVE, launch_args=second_args, script_args=script_args) as second,
    ):
        first.wait_for_line("step 3 ")
        wait_for(lambda: "rank 1 of 2" in second.output(), what="rank 1")
        first.process.kill()
        first.process.wait(10)
        assert second.wait(40) == 75, second.output()
        first.assert_nothing_left()
        second.assert_nothing_left()
