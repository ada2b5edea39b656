"""How an agent takes the ends of its ranks: by the code they left with, whatever their interpreters do after it."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from torch.distributed.elastic.agent.server.api import WorkerState
from torch.distributed.elastic.multiprocessing.api import SubprocessContext

from resilience.context import RunContext
from resilience.last_place import LastPlace, path_of
from resilience.launch import node
from resilience.launch.agent import Agent, NodeState
from resilience.launch.network import free_port
from resilience.launch.ranks import RankFiles
from resilience.rpc.v1 import coordinator_pb2 as pb

ABORT = "import os; os.abort()"


def agent_of(tmp_path: Path, *ranks: str) -> Agent:
    """An agent whose ranks, one for each piece of code, have ended."""
    (tmp_path / "train.py").touch()
    context_path = tmp_path / "context.json"
    RunContext(run_id="r", run_dir=tmp_path, coordinator_address="127.0.0.1:1").write(context_path)
    world = base64.urlsafe_b64encode(json.dumps({"a": list(range(len(ranks)))}).encode()).decode()
    made = node._node(
        [
            *("--resilience-context", str(context_path), f"--world_info={world}", "--node_rank=0"),
            *("--master_addr=127.0.0.1", f"--master_port={free_port()}", str(tmp_path / "train.py")),
        ]
    )
    assignment = pb.Assignment(generation=1, world_size=len(ranks), slots=range(len(ranks)))
    agent = Agent(
        made,
        NodeState(made),
        cast(Any, SimpleNamespace(assignment=assignment)),
        cast(Any, SimpleNamespace(restart=None)),
        check=lambda: None,
        install_signals=lambda: None,
    )
    agent._state.generation = 1
    agent._logs.files = [RankFiles.of(tmp_path, rank, each_rank_log=None) for rank in range(len(ranks))]
    processes = [subprocess.Popen([sys.executable, "-c", code]) for code in ranks]
    for process in processes:
        process.wait(60)
    agent._pcontext = SubprocessContext.__new__(SubprocessContext)
    agent._pcontext.subprocess_handlers = cast(
        Any, {local_rank: SimpleNamespace(proc=process) for local_rank, process in enumerate(processes)}
    )
    return agent


def test_an_abort_after_the_end_is_the_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    agent = agent_of(tmp_path, ABORT, "")
    LastPlace(path_of(tmp_path, 1, 0)).end(0)
    result = agent._monitor_workers(cast(Any, SimpleNamespace(workers=[None, None])))
    assert result.state is WorkerState.SUCCEEDED
    assert [exit_.exit_code for exit_ in agent._exits()] == [0, 0]
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "rank 0 ended with 0, then its interpreter aborted" in said


def test_a_code_survives_an_abort_and_an_abort_without_one_stays(tmp_path: Path) -> None:
    agent = agent_of(tmp_path, ABORT, ABORT, "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    LastPlace(path_of(tmp_path, 1, 0)).end(75)
    LastPlace(path_of(tmp_path, 1, 1)).begin(3, 0, 0)
    LastPlace(path_of(tmp_path, 1, 2)).end(0)
    assert [(exit_.exit_code, exit_.step) for exit_ in agent._exits()] == [(75, 0), (-6, 3), (-9, 0)]
