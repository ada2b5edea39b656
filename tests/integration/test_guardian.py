"""Snapshots of a real run, guarded: what a killed rank leaves, what the next generation is given, and that all goes."""

from __future__ import annotations

from pathlib import Path

import pytest

from resilience.snapshot.arena import Arena
from tests.integration.harness import Run, digest, launched, wait_for

pytestmark = pytest.mark.integration

CONFIG = """
[snapshot]
interval_steps = 1
"""


KILL = """
[[fault]]
step = 10
rank = 1
site = "process"
kind = "kill"
"""


def arena_of(run: Run) -> Arena:
    (path,) = wait_for(run.arenas, what="the arena")
    return Arena(path)


def test_a_killed_rank_and_a_killed_guardian_cost_no_step(tmp_path: Path) -> None:
    with launched(tmp_path / "plain", plain=True, script_args=["--steps", "14", "--save-every", "14"]) as plain:
        assert plain.wait() == 0, plain.output()[-4000:]
    options = {"script_args": ["--steps", "14", "--save-every", "14"], "resilience": CONFIG, "faults": KILL}
    with launched(tmp_path / "killed", **options) as run:
        run.wait_for_line("determinism: two replays")
        arena = arena_of(run)
        first = run.find("resilience.snapshot.guardian")
        first.kill()
        assert run.wait() == 0, run.output()[-6000:]
        report = run.report()
        run.assert_nothing_left()
    assert not arena.path.exists()
    assert report["num_generations"] == 2
    last = report["generations"][-1]
    assert (last["restore"]["step"], last["resumed_after"]) == (9, 9), "no optimizer step is lost"
    assert digest(tmp_path / "killed") == digest(tmp_path / "plain")


def end(run: Run, how: str) -> None:
    if how == "SIGTERM":
        run.process.send_signal(signal.SIGTERM)
        return
    launcher = psutil.Process(run.process.pid)
    victims = {"agent": [run.find("resilience.launch.node")], "launcher": [launcher]}.get(how)
    for victim in victims or [launcher, *launcher.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.kill()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["SIGTERM", "agent", "launcher", "everything"])
def test_nothing_is_left_however_a_run_ends(tmp_path: Path, how: str) -> None:
    with launched(tmp_path / "run", script_args=["--steps", "100000"], resilience=CONFIG) as run:
        run.wait_for_line("step 4 ")
        arena = arena_of(run)
        wait_for(lambda: read_inventory(arena), what="a snapshot")
        end(run, how)
        run.wait(60)
        if how == "everything":
            # Nobody was left to clean up; the next run of this user does.
            with launched(tmp_path / "next", script_args=["--steps", "1"], resilience=CONFIG) as after:
                assert after.wait() == 0, after.output()[-4000:]
                assert f"removed {arena.path}" in after.output()
        assert not arena.path.exists()
        run.assert_nothing_left()
