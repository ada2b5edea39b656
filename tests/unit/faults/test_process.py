"""Faults of processes, with real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from resilience.faults.ledger import Ledger
from resilience.faults.plan import FaultPlan
from resilience.faults.process import ProcessInjector

CHILD = """
import sys
from pathlib import Path
from resilience.faults import FaultPlan, Ledger
from resilience.faults.process import ProcessInjector
run_dir = Path(sys.argv[1])
plan = FaultPlan.model_validate_json(sys.argv[2])
injector = ProcessInjector(plan, rank=1, ledger=Ledger(run_dir, 1), run_dir=run_dir)
for step in range(1, 5):
    injector.begin(step, 0, 0)
"""

SLEEPER = [sys.executable, "-c", "import sys; sys.stdin.read()"]


def plan(kind: str, site: str = "process", **more: object) -> FaultPlan:
    fault = {"step": 3, "rank": 1, "site": site, "kind": kind, **more}
    return FaultPlan.model_validate({"fault": [fault]})


def start(run_dir: Path, what: FaultPlan) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", CHILD, str(run_dir), what.model_dump_json(exclude_none=True)]
    return subprocess.Popen(command)


@pytest.mark.parametrize(("kind", "returncode"), [("kill", -signal.SIGKILL), ("exit", 7)])
def test_a_process_dies_once_per_run(tmp_path: Path, kind: str, returncode: int) -> None:
    what = plan(kind, **({"exit_code": 7} if kind == "exit" else {}))
    assert start(tmp_path, what).wait(30) == returncode
    assert start(tmp_path, what).wait(30) == 0
    (strike,) = Ledger(tmp_path, 1).strikes()
    assert (strike.strike_id, strike.step, strike.site, strike.kind) == ("f0-n0", 3, "process", kind)
    assert not strike.no_effect


def test_a_process_stops(tmp_path: Path) -> None:
    process = start(tmp_path, plan("stop"))
    _, status = os.waitpid(process.pid, os.WUNTRACED)
    process.send_signal(signal.SIGCONT)
    assert process.wait(30) is not None
    assert os.WIFSTOPPED(status)


@pytest.mark.parametrize(("kind", "name"), [("kill", "resilience.coordinator"), ("kill", "stranger")])
def test_only_a_coordinator_is_struck(tmp_path: Path, kind: str, name: str) -> None:
    victim = subprocess.Popen([*SLEEPER, name], stdin=subprocess.PIPE)
    try:
        (tmp_path / "coordinator.json").write_text(json.dumps({"pid": victim.pid}), encoding="utf-8")
        ledger = Ledger(tmp_path, 1)
        ProcessInjector(plan(kind, "coordinator"), rank=1, ledger=ledger, run_dir=tmp_path).begin(3, 0, 0)
        (strike,) = ledger.strikes()
        if name == "stranger":
            assert strike.no_effect
            assert victim.poll() is None
        else:
            assert not strike.no_effect
            assert victim.wait(30) == -signal.SIGKILL
    finally:
        victim.kill()
        victim.communicate()


def test_a_coordinator_is_stopped_and_a_missing_one_is_no_effect(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, 1)
    what = plan("stop", "coordinator", repeat=2)
    injector = ProcessInjector(what, rank=1, ledger=ledger, run_dir=tmp_path)
    injector.begin(3, 0, 0)
    victim = subprocess.Popen([*SLEEPER, "resilience.coordinator"], stdin=subprocess.PIPE)
    try:
        (tmp_path / "coordinator.json").write_text(json.dumps({"pid": victim.pid}), encoding="utf-8")
        injector.begin(3, 0, 1)
        assert os.WIFSTOPPED(os.waitpid(victim.pid, os.WUNTRACED)[1])
    finally:
        victim.kill()
        victim.communicate()
    assert [s.no_effect for s in ledger.strikes()] == [True, False]
