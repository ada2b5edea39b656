"""Whole runs through `deepspeed --resilience`: faults, kills, verdicts, and what the report says of them."""

from __future__ import annotations

import json
import signal
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from tests.integration.harness import DEEPSPEED_CONFIG, digest, launched, resilience, wait_for

pytestmark = [pytest.mark.integration, pytest.mark.slow]

THREE_FAULTS = """
seed = 7
[[fault]]
step = 3
rank = 0
site = "attention.scores"
layer = 1
kind = "inf"

[[fault]]
step = 6
rank = 1
site = "gradient"
kind = "scale"
factor = 1e4

[[fault]]
step = 10
rank = 1
site = "process"
kind = "kill"
"""


@pytest.fixture(scope="module")
def fault_free(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Plain DeepSpeed, without this package: the trajectory that all others are compared with."""
    directory = tmp_path_factory.mktemp("plain")
    with launched(directory, plain=True) as run:
        assert run.wait() == 0, run.output()[-4000:]
    return directory


def only(items: list[dict[str, Any]], **wanted: Any) -> list[dict[str, Any]]:
    return [item for item in items if all(item[key] == value for key, value in wanted.items())]


def test_three_faults_end_in_the_fault_free_weights(tmp_path: Path, fault_free: Path) -> None:
    with launched(tmp_path, faults=THREE_FAULTS) as run:
        assert run.wait() == 0, run.output()[-4000:]
        report = run.report()
        run.assert_nothing_left()
    assert digest(tmp_path) == digest(fault_free)

    assert report["outcome"] == "finished"
    assert report["exit_code"] == 0
    assert report["num_generations"] == 2
    assert report["deterministic"] is True
    assert [fault["step"] for fault in report["faults_injected"]] == [3, 6, 10]
    detections = report["detections"]
    assert [(d["step"], d["site"]) for d in detections] == [(3, "attention.scores"), (6, "gradient"), (10, "process")]
    assert [d["verdict"] for d in detections[:2]] == ["transient", "transient"]
    actions = [d["action"] for d in report["decisions"] if d["action"] != "continue"]
    assert actions == ["corrected", "replay", "restart"]
    assert all(decision["reason"] for decision in report["decisions"])
    assert report["goodput_ratio"] > 0


@pytest.mark.long
def test_three_faults_under_zero3_in_fp32(tmp_path: Path) -> None:
    config = {key: value for key, value in DEEPSPEED_CONFIG.items() if key != "bf16"}
    config["zero_optimization"] = {"stage": 3}
    with launched(tmp_path / "plain", plain=True, deepspeed_config=config) as run:
        assert run.wait() == 0, run.output()[-4000:]
    with launched(tmp_path / "faulted", faults=THREE_FAULTS, deepspeed_config=config) as run:
        assert run.wait() == 0, run.output()[-4000:]
        assert run.report()["num_generations"] == 2
        run.assert_nothing_left()
    assert digest(tmp_path / "faulted") == digest(tmp_path / "plain")


STRUCK_AT_REST = """
[[fault]]
step = 1
rank = 1
site = "weight"
param = "mlp.0.0.weight"
kind = "bitflip"
bit = 14

[[fault]]
step = 6
rank = 1
site = "optimizer"
param = "head.weight"
kind = "bitflip"
bit = 30
"""


def test_damaged_masters_lead_back_to_the_checkpoint_where_no_snapshots_are(tmp_path: Path, fault_free: Path) -> None:
    settings = "[detection]\nat_rest_share = 1.0\n[snapshot]\ninterval_steps = 0\n"
    with launched(tmp_path, faults=STRUCK_AT_REST, resilience=settings) as run:
        assert run.wait() == 0, run.output()[-4000:]
        report = run.report()
        run.assert_nothing_left()
    assert digest(tmp_path) == digest(fault_free)
    assert [(f["step"], f["site"]) for f in report["faults_injected"]] == [(1, "weight"), (6, "optimizer")]
    found = [(d["step"], d["rank"], d["site"], d["verdict"]) for d in report["detections"]]
    assert found == [(2, 1, "weight", "transient"), (7, 1, "optimizer", "transient")]
    assert [(d["step"], d["action"]) for d in report["decisions"]] == [(2, "corrected"), (7, "restart")]
    assert "master of head.weight" in report["decisions"][1]["reason"]
    assert report["num_generations"] == 2
    measured = [note for note in report["notes"] if note["kind"] == "determinism"]
    assert (report["deterministic"], len(measured)) == (True, 1), "the second generation need not measure it again"


@pytest.mark.parametrize("share", [1.0, 0.3])
def test_persistent_fault_stops_with_75_and_cordons_the_device(tmp_path: Path, share: float) -> None:
    """Also where only a share of the calls is checked: not every step is seen, but every replay is."""
    fault = 'rank = 1\nsite = "linear.out"\nlayer = 1\nkind = "scale"\nfactor = 64.0\nrepeat = -1\n'
    faults = "".join(f"[[fault]]\nstep = {step}\n{fault}" for step in range(3, 4 if share == 1.0 else 9))
    with launched(tmp_path, faults=faults, resilience=f"[detection]\nshare = {share}\n") as run:
        assert run.wait() == 75, run.output()[-4000:]
        report = run.report()
        run.assert_nothing_left()
        devices = resilience("devices", "--json", "--run-dir", str(run.run_dir), cwd=tmp_path, state=tmp_path / "state")
    assert report["exit_code"] == 75
    assert report["num_generations"] == 1, "a persistent fault must not be tried again in a new generation"
    assert {d["verdict"] for d in report["detections"]} == {"persistent"}
    stop = only(report["decisions"], action="stop")
    assert len(stop) == 1
    assert "persistent" in stop[0]["reason"]
    replays = only(report["decisions"], action="replay")
    assert 1 <= len(replays) <= 2
    assert devices.returncode == 0, devices.stderr
    assert '"cordoned": true' in devices.stdout


def test_nan_from_the_data_is_deterministic_and_skipped(tmp_path: Path) -> None:
    with launched(tmp_path, script_args=["--nan-from-step", "5"]) as run:
        assert run.wait() == 0, run.output()[-4000:]
        report = run.report()
        assert "skipped 1" in run.output()
        run.assert_nothing_left()
    assert {d["verdict"] for d in report["detections"]} == {"deterministic"}
    assert report["faults_injected"] == []


def test_nan_in_a_row_ends_in_93(tmp_path: Path) -> None:
    with launched(
        tmp_path,
        script_args=["--nan-from-step", "3", "--nan-steps", "100", "--steps", "30"],
        resilience="[policy]\nmax_skips_in_a_row = 3\n",
    ) as run:
        assert run.wait() == 93, run.output()[-4000:]
        report = run.report()
        run.assert_nothing_left()
    assert report["exit_code"] == 93
    assert "3" in only(report["decisions"], action="stop")[0]["reason"]


def test_exception_in_the_script_ends_in_93(tmp_path: Path) -> None:
    with launched(tmp_path, script_args=["--raise-at-step", "6"]) as run:
        assert run.wait() == 93, run.output()[-4000:]
        report = run.report()
        run.assert_nothing_left()
    assert report["num_generations"] == 2
    stop = only(report["decisions"], action="stop")[0]
    assert "step 6" in stop["reason"] or "the script's own mistake" in stop["reason"]


LONG = ["--steps", "400", "--save-every", "50"]


def test_kill_of_the_agent_ends_everything_with_75(tmp_path: Path) -> None:
    with launched(tmp_path, script_args=LONG) as run:
        run.wait_for_line("step 8 ")
        run.find("resilience.launch.node").send_signal(signal.SIGKILL)
        assert run.wait(60) == 75
        run.assert_nothing_left()
        assert run.report()["exit_code"] == 75


def test_kill_of_the_runner_leaves_nothing(tmp_path: Path) -> None:
    with launched(tmp_path, script_args=LONG) as run:
        run.wait_for_line("step 8 ")
        run.process.send_signal(signal.SIGKILL)
        assert run.wait(30) == -signal.SIGKILL
        run.assert_nothing_left()
        assert run.report()["exit_code"] != 0


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_everything_with_75(tmp_path: Path, signal_number: signal.Signals) -> None:
    with launched(tmp_path, script_args=LONG) as run:
        run.wait_for_line("step 8 ")
        run.process.send_signal(signal_number)
        assert run.wait(30) == 75
        run.assert_nothing_left()
        assert run.report()["exit_code"] == 75


def test_kill_of_the_coordinator_does_not_stop_training(tmp_path: Path) -> None:
    """It comes back, knows what happened before, and a fault after its return is decided as ever."""
    faults = '[[fault]]\nstep = 4\nrank = 0\nsite = "linear.out"\nkind = "inf"\n'
    faults += '[[fault]]\nstep = 120\nrank = 1\nsite = "gradient"\nkind = "scale"\nfactor = 1e4\n'
    with launched(tmp_path, script_args=["--steps", "140", "--save-every", "70"], faults=faults) as run:
        run.wait_for_line("step 20 ")
        first = json.loads((run.run_dir / "coordinator.json").read_text())
        run.find("resilience.coordinator").send_signal(signal.SIGKILL)

        def came_back() -> bool:
            again = json.loads((run.run_dir / "coordinator.json").read_text())
            return bool(again["pid"] != first["pid"] and again["address"] == first["address"])

        wait_for(came_back, what="a new coordinator at the same address")
        assert run.wait() == 0, run.output()[-4000:]
        report = run.report()
        run.assert_nothing_left()
    assert report["num_generations"] == 1
    assert [(d["step"], d["verdict"]) for d in report["detections"]] == [(4, "transient"), (120, "transient")]
    with sqlite3.connect(f"file:{run.run_dir / 'journal.db'}?mode=ro", uri=True) as journal:
        assert journal.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_kill_of_a_rank_before_the_first_checkpoint_starts_from_scratch(tmp_path: Path, fault_free: Path) -> None:
    faults = '[[fault]]\nstep = 2\nrank = 0\nsite = "process"\nkind = "kill"\n'
    with launched(tmp_path, faults=faults) as run:
        assert run.wait() == 0, run.output()[-4000:]
        assert run.report()["num_generations"] == 2
        run.assert_nothing_left()
    assert digest(tmp_path) == digest(fault_free)


def test_rank_that_hangs_is_restarted(tmp_path: Path, fault_free: Path) -> None:
    faults = '[[fault]]\nstep = 6\nrank = 1\nsite = "process"\nkind = "stop"\n'
    with launched(tmp_path, faults=faults, resilience="[coordinator]\nlease_s = 3.0\n") as run:
        assert run.wait() == 0, run.output()[-4000:]
        report = run.report()
        run.assert_nothing_left()
    assert report["num_generations"] == 2
    assert [(d["kind"], d["rank"]) for d in report["detections"]] == [("hang", 1)]
    assert digest(tmp_path) == digest(fault_free)


def test_restart_budget_ends_in_75(tmp_path: Path) -> None:
    faults = '[[fault]]\nstep = 6\nrank = 0\nsite = "process"\nkind = "kill"\nrepeat = -1\n'
    with launched(tmp_path, faults=faults, resilience="[policy]\nmax_restarts = 1\n") as run:
        assert run.wait() == 75, run.output()[-4000:]
        report = run.report()
        run.assert_nothing_left()
    assert report["num_generations"] == 2


def test_shadow_mode_acts_on_nothing(tmp_path: Path) -> None:
    faults = '[[fault]]\nstep = 5\nrank = 1\nsite = "gradient"\nkind = "scale"\nfactor = 1e4\n'
    with launched(tmp_path, faults=faults, resilience='mode = "shadow"\n') as run:
        assert run.wait() == 0, run.output()[-4000:]
        report = run.report()
        run.assert_nothing_left()
    assert [d["outcome"] for d in report["decisions"]] == ["shadowed"]
    assert "replay" in report["decisions"][0]["reason"]


@pytest.mark.parametrize("num_steps", [400, pytest.param(2000, marks=pytest.mark.long)])
def test_clean_steps_invent_nothing(tmp_path: Path, num_steps: int) -> None:
    config = {**DEEPSPEED_CONFIG, "gradient_accumulation_steps": 1}
    options = ["--steps", str(num_steps), "--save-every", str(num_steps // 2)]
    with launched(tmp_path, script_args=options, deepspeed_config=config) as run:
        assert run.wait(400) == 0, run.output()[-4000:]
        report = run.report()
        run.assert_nothing_left()
    assert report["detections"] == []
    assert report["decisions"] == []
    assert report["num_steps"] == num_steps
