"""What a rank is given: the same as DeepSpeed's launcher gives it, and our variables."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from resilience.config import Config
from resilience.context import RunContext
from resilience.launch import ranks, shim
from resilience.launch.processes import is_alive
from resilience.rpc.v1 import coordinator_pb2 as pb
from tests.integration.harness import wait_for


def plan(tmp_path: Path, *, mode: str = "enforce", logs: list[Path | None] | None = None, **changed: Any) -> Any:
    arguments: dict[str, Any] = {
        "no_python": False,
        "module": False,
        "no_local_rank": False,
        "bind_cores_to_rank": False,
        "bind_core_list": None,
        "training_script": "train.py",
        "training_script_args": ["--lr", "1"],
        **changed,
    }
    context = RunContext(
        run_id="r", run_dir=tmp_path, coordinator_address="h:1", config=Config.model_validate({"mode": mode})
    )
    assignment = pb.Assignment(generation=3, node_index=1, num_nodes=2, world_size=4, first_rank=2, slots=[0, 5])
    return ranks.plan_ranks(
        argparse.Namespace(**arguments),
        context=context,
        context_path=tmp_path / "context.json",
        node="worker-1",
        assignment=assignment,
        devices=[pb.Device(slot=0, device="GPU-a"), pb.Device(slot=5, device="GPU-b")],
        each_rank_logs=logs or [None, None],
    )


def test_environment_of_a_rank(tmp_path: Path) -> None:
    environment = plan(tmp_path)["ranks"][1]["environment"]
    assert environment == {
        "CUDA_VISIBLE_DEVICES": "0,5",
        "CROSS_RANK": "1",
        "CROSS_SIZE": "2",
        "LOCAL_SIZE": "2",
        "RESILIENCE_CONTEXT": str(tmp_path / "context.json"),
        "RESILIENCE_GENERATION": "3",
        "RESILIENCE_NODE": "worker-1",
        "RESILIENCE_DEVICE": "GPU-b",
    }


def test_mode_off_loads_nothing_into_ranks(tmp_path: Path) -> None:
    assert "RESILIENCE_CONTEXT" not in plan(tmp_path, mode="off")["ranks"][0]["environment"]


@pytest.mark.parametrize(
    ("changed", "command"),
    [
        ({}, [sys.executable, "-u", "train.py", "--local_rank=1", "--lr", "1"]),
        ({"module": True}, [sys.executable, "-u", "-m", "train.py", "--local_rank=1", "--lr", "1"]),
        ({"no_python": True, "no_local_rank": True}, ["train.py", "--lr", "1"]),
    ],
)
def test_command_of_a_rank(tmp_path: Path, changed: dict[str, Any], command: list[str]) -> None:
    assert plan(tmp_path, **changed)["ranks"][1]["command"] == command


def test_core_binding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def binding(core_list: str | None, *, num_local_ranks: int, local_rank: int) -> tuple[int, list[str]]:
        asked.append((core_list, num_local_ranks, local_rank))
        return 4, ["numactl", "-C", "4-7"]

    monkeypatch.setattr(ranks, "core_binding", binding)
    rank = plan(tmp_path, bind_cores_to_rank=True, bind_core_list="0-7")["ranks"][1]
    assert asked == [("0-7", 2, 0), ("0-7", 2, 1)]
    assert rank["command"][:4] == ["numactl", "-C", "4-7", sys.executable]
    assert rank["environment"]["OMP_NUM_THREADS"] == "4"


def shimmed(*words: str, parent: int | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    kind, *rest = words
    return subprocess.run(
        [sys.executable, "-I", "-S", shim.__file__, kind, str(parent or os.getpid()), str(int(signal.SIGKILL)), *rest],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_shim_becomes_the_rank_of_the_plan(tmp_path: Path) -> None:
    program = "import os, sys; print(os.environ['RESILIENCE_DEVICE'], sys.argv[1:]); print('loud', file=sys.stderr)"
    log = tmp_path / "rank1.log"
    written = plan(tmp_path, logs=[None, log], no_python=True, training_script=sys.executable)
    for rank in written["ranks"]:
        rank["command"] = [sys.executable, "-c", program, *rank["command"][1:]]
    ranks.write_plan(tmp_path / "plan.json", written)
    first = shimmed("rank", str(tmp_path / "plan.json"), LOCAL_RANK="0")
    assert (first.returncode, first.stdout) == (0, "GPU-a ['--local_rank=0', '--lr', '1']\n")
    second = shimmed("rank", str(tmp_path / "plan.json"), LOCAL_RANK="1")
    assert (second.returncode, second.stdout, second.stderr) == (0, "", "")
    assert sorted(log.read_text().splitlines()) == ["GPU-b ['--local_rank=1', '--lr', '1']", "loud"]


def test_shim_names_what_cannot_be_executed() -> None:
    answer = shimmed("exec", "/absent/program")
    assert answer.returncode == 64
    assert answer.stderr.startswith(
        "resilience: /absent/program: cannot be executed (No such file or directory); check"
    )


def test_shim_does_not_start_an_orphan() -> None:
    answer = shimmed("exec", sys.executable, "-c", "print('started')", parent=1 << 22)
    assert answer.returncode == 64
    assert "is gone" in answer.stderr
    assert answer.stdout == ""


def test_shimmed_process_dies_with_its_parent(tmp_path: Path) -> None:
    """A parent that starts a sleeping child through the shim and is killed: the child ends."""
    ready = tmp_path / "pid"
    child = f"import os, time; open({str(ready)!r}, 'w').write(str(os.getpid()) + '.'); time.sleep(600)"
    program = (
        "import os, subprocess, sys\n"
        f"subprocess.run([sys.executable, '-I', '-S', {shim.__file__!r}, 'exec', str(os.getpid()), '9',"
        f" sys.executable, '-c', {child!r}])"
    )
    parent = subprocess.Popen([sys.executable, "-c", program])
    wait_for(lambda: ready.exists() and ready.read_text().endswith("."), what="the child")
    pid = int(ready.read_text()[:-1])
    parent.kill()
    parent.wait()
    wait_for(lambda: not is_alive(pid), what="the end of the child", timeout_s=20)


def test_plan_holds_no_secret(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("secret-token")
    assert "secret-token" not in json.dumps(plan(tmp_path))
