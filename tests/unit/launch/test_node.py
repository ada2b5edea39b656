"""What an agent refuses before it asks for a place."""

from __future__ import annotations

import base64
import errno
import json
import os
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from resilience.context import RunContext
from resilience.errors import ConfigError, UsageError
from resilience.launch import node
from resilience.launch.agent import Node, NodeState
from resilience.launch.network import free_port
from resilience.launch.ranks import RankFiles


def argv(tmp_path: Path, script: str, *, node_rank: int = 0, port: int = 0, more: tuple[str, ...] = ()) -> list[str]:
    context_path = tmp_path / "context.json"
    RunContext(run_id="r", run_dir=tmp_path, coordinator_address="127.0.0.1:1").write(context_path)
    world = base64.urlsafe_b64encode(json.dumps({"a": [0, 3], "b": [1]}).encode()).decode()
    return [
        *("--resilience-context", str(context_path), f"--world_info={world}", f"--node_rank={node_rank}"),
        *("--master_addr=127.0.0.1", f"--master_port={port or free_port()}", "--log_level=error", *more, script),
    ]


@pytest.fixture
def script(tmp_path: Path) -> str:
    (tmp_path / "train.py").touch()
    return str(tmp_path / "train.py")


def test_a_node_offers_its_slots(tmp_path: Path, script: str) -> None:
    made = node._node(argv(tmp_path, script))
    assert (made.name, made.node_rank, made.num_nodes, made.address) == ("a", 0, 2, "127.0.0.1")
    assert [(device.slot, device.device) for device in made.devices] == [(0, "cpu:a:0"), (3, "cpu:a:3")]
    assert [device.slot for device in node._node(argv(tmp_path, script, node_rank=1)).devices] == [1]


def test_mistakes_are_named(tmp_path: Path, script: str) -> None:
    with pytest.raises(UsageError, match="--resilience-context PATH"):
        node._node(["train.py"])
    with pytest.raises(ConfigError, match=r"absent\.json: run context cannot be read"):
        node._node(["--resilience-context", "absent.json", *argv(tmp_path, script)[2:]])
    with pytest.raises(UsageError, match=r"absent\.py: no such training script"):
        node._node(argv(tmp_path, "absent.py"))
    node._node(argv(tmp_path, "a.module", more=("--module",)))
    with pytest.raises(UsageError, match=r"--enable_each_rank_log .*train\.py: cannot be made"):
        node._node(argv(tmp_path, script, more=(f"--enable_each_rank_log={script}",)))


def test_a_busy_master_port_is_named(tmp_path: Path, script: str) -> None:
    with socket.socket() as busy:
        busy.bind(("0.0.0.0", 0))
        busy.listen()
        port = busy.getsockname()[1]
        with pytest.raises(UsageError, match=f"--master_port {port}: in use"):
            node._node(argv(tmp_path, script, port=port))
        node._node(argv(tmp_path, script, port=port, node_rank=1))


def test_later_generations_meet_at_another_port(tmp_path: Path, script: str) -> None:
    made: Node = node._node(argv(tmp_path, script))
    state = NodeState(made)
    asked: Any = state.describe()
    assert asked.master_port == made.arguments.master_port
    assert (asked.pid, asked.last_generation, asked.reason) == (os.getpid(), 0, "first start")
    state.generation = 1
    state.ended((), "rank 3 hangs")
    asked = state.describe()
    assert asked.master_port not in (0, made.arguments.master_port)
    assert (asked.last_generation, asked.reason) == (1, "rank 3 hangs")
    assert not state.finished, "a generation that was ended has not finished"


def test_a_full_disk_between_generations_ends_in_75_with_one_line(tmp_path: Path, script: str) -> None:
    def run() -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "ranks-a.json")

    life = node._Life(node._node(argv(tmp_path, script)))
    code, reason = life._supervise(cast(Any, SimpleNamespace(run=run)))
    assert code == 75
    assert "No space left on device: 'ranks-a.json'" in reason


def test_logs_of_a_rank(tmp_path: Path) -> None:
    files = RankFiles.of(tmp_path, 3, each_rank_log=None)
    assert (files.out.name, files.err.name, files.log) == ("rank-3.out", "rank-3.err", None)
