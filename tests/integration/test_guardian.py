"""Snapshots of a real run, guarded: what a killed rank leaves, what the next generation is given, and that all goes."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import tempfile
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from resilience.checkpoint.publish import read_latest
from resilience.snapshot.arena import Arena
from resilience.snapshot.inventory import read_inventory
from tests.integration.harness import Run, digest, launched, resilience, wait_for

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
    told = report["snapshots"]
    # What the killed generation had not told in a heartbeat died with it: two a second, whatever a step takes.
    assert 5 <= told["num_taken"] <= 14, "the second generation told all of its own before it ended"
    assert (told["interval_steps"], told["num_steps_lost"], told["rewinds"]) == (1, 0, [])
    assert told["blocked_s"] > 0.0
    assert report["badput_s"]["snapshot"] == told["blocked_s"]
    (restore,) = told["restores"]
    assert (restore["tier"], restore["step"]) == ("memory", 9)
    assert 0.0 < restore["seconds"] < report["decisions"][-1]["latency_ms"] / 1e3
    assert told["newest_step"]["memory"] >= 9
    assert digest(tmp_path / "killed") == digest(tmp_path / "plain")


def scraped(run: Run) -> dict[str, float]:
    """What `/metrics` serves, by name with labels."""
    address = json.loads((run.run_dir / "coordinator.json").read_text())["metrics_address"]
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


def test_a_snapshot_on_order_is_answered_when_all_ranks_have_it(tmp_path: Path) -> None:
    config = CONFIG.replace("= 1", "= 10") + "\n[detection]\nat_rest_share = 0.5\n"
    with launched(tmp_path / "run", script_args=["--steps", "100000"], resilience=config) as run:
        run.wait_for_line("step 4 ")
        answer = resilience("snapshot", "now", "--run-dir", str(run.run_dir), "--json", cwd=tmp_path)
        assert answer.returncode == 0, answer.stderr
        taken = json.loads(answer.stdout)
        run_id = json.loads((run.run_dir / "coordinator.json").read_text())["run_id"]
        assert taken["answer"] == "taken"
        wait_for(lambda: (taken["step"], 1) in arena_of(run).published(), what="its manifest")
        name = f'resilience_last_verified_step{{run="{run_id}",tier="memory"}}'
        wait_for(lambda: scraped(run).get(name, 0.0) >= taken["step"], what="it to be known to be clean")
        run.process.send_signal(signal.SIGTERM)
        assert run.wait(60) == 75
        report = run.report()
        run.assert_nothing_left()
    told = report["snapshots"]
    assert told["num_taken"] >= 3
    assert told["newest_step"]["memory"] > told["newest_clean_step"] >= taken["step"] > 1


def end(run: Run, how: str) -> None:
    if how == "SIGTERM":
        run.process.send_signal(signal.SIGTERM)
        return
    launcher = psutil.Process(run.process.pid)
    victims = {"agent": [run.find("resilience.launch.node")], "launcher": [launcher]}.get(how)
    victims = victims or [launcher, *launcher.children(recursive=True)]
    # All at once: none sees another's end, and cleans up after it.
    for act in (psutil.Process.suspend, psutil.Process.kill):
        for victim in victims:
            with contextlib.suppress(psutil.NoSuchProcess):
                act(victim)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["SIGTERM", "agent", "launcher"])
def test_nothing_is_left_however_a_run_ends(tmp_path: Path, how: str) -> None:
    with launched(tmp_path / "run", script_args=["--steps", "100000"], resilience=CONFIG) as run:
        run.wait_for_line("step 4 ")
        arena = arena_of(run)
        wait_for(lambda: read_inventory(arena), what="a snapshot")
        end(run, how)
        run.wait(60)
        run.assert_nothing_left()


@pytest.fixture
def folder() -> Iterator[Path]:
    """On tmpfs; a run in the usual place may be cleaned up after by that of another test."""
    path = Path(tempfile.mkdtemp(prefix="resilience-test-", dir="/dev/shm"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.mark.slow
def test_where_nobody_was_left_to_clean_up_the_next_run_does(tmp_path: Path, folder: Path) -> None:
    config = f'{CONFIG}dir = "{folder}"\n'
    with launched(tmp_path / "run", script_args=["--steps", "100000"], resilience=config) as run:
        run.wait_for_line("step 4 ")
        (arena,) = folder.iterdir()
        wait_for(lambda: read_inventory(Arena(arena)), what="a snapshot")
        end(run, "everything")
        run.wait(60)
    assert arena.exists()
    with launched(tmp_path / "next", script_args=["--steps", "1"], resilience=config) as after:
        assert after.wait() == 0, after.output()[-4000:]
        assert f"removed {arena}" in after.output()
    assert list(folder.iterdir()) == []


@pytest.mark.slow
def test_a_preempted_run_leaves_its_newest_snapshot_as_a_checkpoint(tmp_path: Path) -> None:
    config = f"{CONFIG}flush_interval_s = 1.0\n"
    with launched(tmp_path / "run", script_args=["--steps", "100000"], resilience=config) as run:
        snapshots = run.run_dir / "snapshots"
        run.wait_for_line("step 4 ")
        wait_for(lambda: read_latest(snapshots), what="a snapshot on disk")
        reached = wait_for(lambda: [step for step, _ in arena_of(run).published()], what="one in memory")[-1]
        run.process.send_signal(signal.SIGTERM)
        assert run.wait(60) == 75
        run.assert_nothing_left()
    tag = read_latest(snapshots)
    assert tag is not None
    step = int(tag.removeprefix("global_step"))
    assert step >= reached, "what was in memory is on disk"
    assert len(list(snapshots.iterdir())) <= 3, "two checkpoints and `latest`"
    answer = resilience("checkpoints", "verify", str(snapshots), cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    for path in (snapshots / tag).glob("*.pt"):
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None
    # It is what DeepSpeed would have saved, and a script that is given it goes on from there.
    with launched(
        tmp_path / "plain", plain=True, script_args=["--steps", str(step), "--save-every", str(step)]
    ) as plain:
        assert plain.wait() == 0, plain.output()[-4000:]
    shutil.copytree(snapshots, tmp_path / "again" / "checkpoints")
    assert digest(tmp_path / "again", tag) == digest(tmp_path / "plain", tag)
    with launched(tmp_path / "again", script_args=["--steps", str(step + 1)], resilience=CONFIG) as again:
        assert again.wait() == 0, again.output()[-4000:]
        assert again.report()["num_steps"] == step + 1
