"""A launch without `--resilience` is DeepSpeed's own, to the last word; with it only the per-node launcher differs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HOSTS = "worker-0 slots=2\nworker-1 slots=2\n"
LOCAL = [
    [],
    ["--num_gpus", "2"],
    ["--num_accelerators", "1", "--master_port", "29610", "--master_addr", "127.0.0.2"],
    ["--include", "localhost:0"],
    ["-q"],
    ["--log_level", "warning", "--save_pid"],
    ["--module"],
    ["--no_python", "--no_local_rank"],
    ["--enable_each_rank_log", "logs"],
    ["--bind_cores_to_rank", "--bind_core_list", "0-1"],
    ["--launcher", "slurm", "--launcher_args=-x"],
    ["--num_gpus", "2", "--include", "localhost:0"],
    ["--num_nodes", "2"],
]
"""The last two are refused by DeepSpeed itself."""
REMOTE = [
    [],
    ["--include", "worker-1:0", "--force_multi"],
    ["--exclude", "worker-0:1", "--ssh_port", "2222"],
    ["--num_nodes", "1", "--force_multi", "--venv_script", "/venv/bin/activate"],
    ["--module", "--no_local_rank", "--launcher_args=-t 5"],
    ["--no_ssh", "--node_rank", "1"],
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a hostfile, a DeepSpeed environment file, and a `pdsh` to be found."""
    directory = tmp_path_factory.mktemp("place")
    (directory / "hostfile").write_text(HOSTS)
    (directory / ".deepspeed_env").write_text("NCCL_DEBUG=INFO\n")
    pdsh = directory / "pdsh"
    pdsh.write_text("#!/bin/sh\n")
    pdsh.chmod(0o755)
    return directory


def lines(place: Path) -> list[list[str]]:
    script = ["train.py", "--lr", "1 e", "--resilience-like", "x", "--deepspeed_config", "ds.json"]
    reach = ["--hostfile", str(place / "hostfile"), "--no_ssh_check", "--master_addr", "10.0.0.1"]
    return [[*options, *script] for options in LOCAL] + [[*reach, *options, *script] for options in REMOTE]


def answers(place: Path, kind: str, commands: list[list[str]]) -> list[Any]:
    environment = {**os.environ, "PATH": f"{place}:{os.environ['PATH']}", "NCCL_ALGO": "Ring", "PYTHONSEED": "1"}
    answer = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("commands.py")), kind],
        input="".join(json.dumps(command) + "\n" for command in commands),
        capture_output=True,
        text=True,
        cwd=place,
        env=environment,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    found = [json.loads(line[7:]) for line in answer.stdout.splitlines() if line.startswith("ANSWER ")]
    assert len(found) == len(commands), answer.stdout
    return [[_without_pid(part) if isinstance(part, list) else part for part in item] for item in found]


def _without_pid(argv: list[str]) -> list[str]:
    """The pid that `--save_pid` passes on is that of the process that asks."""
    at = argv.index("--save_pid") + 1 if "--save_pid" in argv else len(argv)
    return [*argv[:at], *argv[at + 1 :]]


def test_commands_without_resilience_are_deepspeeds_own(place: Path) -> None:
    commands = lines(place)
    stock, extended = answers(place, "stock", commands), answers(place, "extended", commands)
    for command, ours, theirs in zip(commands, extended, stock, strict=True):
        assert ours == theirs, command
    assert sum(isinstance(item[0], list) for item in stock) == len(commands) - 2
    assert any(item[0][0] == "pdsh" for item in stock)


def test_with_resilience_only_the_launcher_of_each_node_differs(place: Path) -> None:
    commands = [line for line in lines(place) if line not in lines(place)[len(LOCAL) - 2 : len(LOCAL)]]
    for stock, ours, is_remote, world, master_addr in answers(place, "planned", commands):
        at = stock.index("deepspeed.launcher.launch")
        added = ["resilience.launch.node", "--resilience-context", "/run/context.json"]
        assert ours == [*stock[:at], *added, *stock[at + 1 :]]
        assert is_remote == (stock[0] == "pdsh")
        assert set(world) <= {"localhost", "worker-0", "worker-1"}
        assert f"--master_addr={master_addr}" in stock
