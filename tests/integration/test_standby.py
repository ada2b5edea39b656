"""A run whose dead ranks are replaced from the standby process, or anew where it is gone, ends in the same weights."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import psutil
import pytest

from tests.integration.harness import SCRIPTS, Run, digest, launched, wait_for

pytestmark = [pytest.mark.integration, pytest.mark.slow]

SCRIPT = SCRIPTS / "train_waiting.py"
FROM_CHECKPOINTS = "[snapshot]\ninterval_steps = 0\n"


def waiting(run: Run, step: int) -> dict[int, int]:
    """Rank → pid of those that wait before `step` now."""
    found = re.findall(rf"rank (\d) waits at step {step}, pid (\d+)", run.output())
    return {int(rank): int(pid) for rank, pid in found if psutil.pid_exists(int(pid))}


@pytest.mark.long
def test_forked_and_fresh_ranks_train_bit_identically(tmp_path: Path) -> None:
    with launched(tmp_path / "plain", plain=True, script=SCRIPT) as plain:
        assert plain.wait() == 0, plain.output()[-4000:]
    words = ["--wait-for", str(tmp_path), "--wait-at", "6", "11"]
    with launched(tmp_path / "run", script=SCRIPT, script_args=words, resilience=FROM_CHECKPOINTS) as run:
        log = run.run_dir / "logs" / "standby-localhost.log"
        wait_for(lambda: log.exists() and "ready with" in log.read_text(), what="the standby process", timeout_s=300.0)
        first = wait_for(lambda: found if len(found := waiting(run, 6)) == 2 else None, what="two ranks at step 6")
        os.kill(first[1], signal.SIGKILL)
        (tmp_path / "6").touch()

        second = wait_for(lambda: found if len(found := waiting(run, 11)) == 2 else None, what="two ranks at step 11")
        zygote = run.find("resilience.launch.zygote")
        for rank, pid in second.items():
            process = psutil.Process(pid)
            assert process.cmdline()[2:4] == [str(SCRIPT), f"--local_rank={rank}"]
            assert "RANK" not in process.environ()  # what the kernel remembers is the standby process's
            assert process.ppid() == zygote.ppid()
            assert f"pid {pid}" in (run.run_dir / f"logs/generation-2/rank-{rank}.out").read_text()
        zygote.kill()
        os.kill(second[0], signal.SIGKILL)
        (tmp_path / "11").touch()

        assert run.wait() == 0, run.output()[-4000:]
        assert run.report()["num_generations"] == 3
        assert run.output().count("the standby process is gone") == 1
        run.assert_nothing_left()
    assert digest(tmp_path / "run") == digest(tmp_path / "plain")


def test_forked_ranks_die_with_their_agent(tmp_path: Path) -> None:
    words = ["--wait-for", str(tmp_path), "--wait-at", "6"]
    with launched(tmp_path / "run", script=SCRIPT, script_args=words, resilience=FROM_CHECKPOINTS) as run:
        log = run.run_dir / "logs" / "standby-localhost.log"
        wait_for(lambda: log.exists() and "ready with" in log.read_text(), what="the standby process", timeout_s=300.0)
        first = wait_for(lambda: found if len(found := waiting(run, 6)) == 2 else None, what="two ranks at step 6")
        os.kill(first[0], signal.SIGKILL)

        def forked() -> dict[int, int] | None:
            found = waiting(run, 6)
            return found if len(found) == 2 and not set(found.values()) & set(first.values()) else None

        second = wait_for(forked, what="two forked ranks")
        agent = psutil.Process(second[0]).parent()
        assert agent is not None
        agent.kill()
        assert run.wait() == 75, run.output()[-4000:]
        assert not any(psutil.pid_exists(pid) for pid in second.values())
        run.assert_nothing_left()
