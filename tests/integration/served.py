"""A coordinator in a process of its own, with members whose messages a test sends: a run without any training."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc

from resilience.rpc.v1 import coordinator_pb2 as pb
from resilience.rpc.v1 import coordinator_pb2_grpc as rpc
from tests.integration.harness import free_port, wait_for

__all__ = ["COMMAND", "Served", "serve"]

TOKEN = "a token of enough characters"
COMMAND = [sys.executable, "-c", "import sys; from resilience.cli.main import main; sys.exit(main())"]
"""The command in a process of its own, from this source tree."""


@dataclasses.dataclass
class Served:
    """The coordinator of a run with one node, `a`, and two ranks; `directory` holds ./resilience-runs."""

    directory: Path
    port: int
    process: subprocess.Popen[bytes]
    sequence: int = 0
    generation: int = 1
    in_order: threading.Lock = dataclasses.field(default_factory=threading.Lock)
    """A member's reports arrive in the order of their numbers, whichever thread sends them."""

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def token_file(self) -> Path:
        return self.directory / "token"

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        return (("authorization", f"Bearer {TOKEN}"),)

    def report(self, member: str = "rank:0", **content: object) -> list[pb.ReportResponse]:
        """One report of a member: heartbeat, detections, checkpoints, snapshots, notes."""
        with self.in_order, grpc.insecure_channel(self.address) as channel:
            self.sequence += 1
            request = pb.ReportRequest(
                run_id="r1", generation=self.generation, member=member, sequence=self.sequence, **content
            )
            return list(rpc.CoordinatorStub(channel).Report(iter([request]), metadata=self.metadata))

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Two ranks that take a step every tenth of a second, and their agent, until the block or the run ends."""
        stopped = threading.Event()

        def train() -> None:
            with contextlib.suppress(grpc.RpcError):  # the run has ended, or its coordinator
                for step in itertools.count(1):
                    for rank in range(2):
                        beat = pb.Heartbeat(step=step, loss=3.0 / step, state="training", step_seconds=0.1)
                        self.report(f"rank:{rank}", heartbeat=beat)
                    self.report("agent:a")
                    if stopped.wait(0.1):
                        return

        thread = threading.Thread(target=train)
        thread.start()
        try:
            yield
        finally:
            stopped.set()
            thread.join()

    def obey(self, **answer: object) -> threading.Thread:
        """Rank 0 answers the order for a snapshot that it will hear."""

        def look() -> str | None:
            found = (order for response in self.report() for order in response.directives)
            return next((order.directive_id for order in found if order.HasField("take_snapshot")), None)

        def run() -> None:
            order = wait_for(look, what="the order")
            self.report(answers=[pb.OrderAnswer(directive_id=order, **answer)])  # type: ignore[arg-type]

        thread = threading.Thread(target=run)
        thread.start()
        return thread

    def decide(self, step: int, *detections: pb.Detection) -> pb.Decision:
        """Rank 0 asks what to do about what was seen in `step`, and tells that it was done."""
        evidence = pb.Evidence(
            run_id="r1",
            generation=self.generation,
            step=step,
            world_size=2,
            detections=detections,
            replay_available=True,
        )
        with grpc.insecure_channel(self.address) as channel:
            stub = rpc.CoordinatorStub(channel)
            decision = stub.Decide(pb.DecideRequest(evidence=evidence), metadata=self.metadata).decision
            decision.outcome = pb.OUTCOME_SUCCEEDED
            stub.Conclude(pb.ConcludeRequest(run_id="r1", decision=decision), metadata=self.metadata)
        return decision

    def join(self) -> None:
        """The agent and both ranks."""
        devices = [pb.Device(slot=slot, device=f"device-{slot}") for slot in range(2)]
        agent = pb.AgentInfo(node="a", num_nodes=1, address="127.0.0.1", devices=devices, pid=7)
        with grpc.insecure_channel(self.address) as channel:
            stub = rpc.CoordinatorStub(channel)
            stub.Join(pb.JoinRequest(run_id="r1", agent=agent, wait_s=5.0), metadata=self.metadata)
            for rank in range(2):
                info = pb.RankInfo(generation=1, rank=rank, local_rank=rank, world_size=2, node="a", pid=100 + rank)
                stub.Join(pb.JoinRequest(run_id="r1", rank=info), metadata=self.metadata)

    def finish(self, exit_code: int) -> None:
        """The launcher says how the run ended."""
        with grpc.insecure_channel(self.address) as channel:
            request = pb.LeaveRequest(run_id="r1", member="launcher", exit_code=exit_code)
            rpc.CoordinatorStub(channel).Leave(request, metadata=self.metadata)

    def end(self) -> None:
        """Stop the coordinator as its operator would."""
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(timeout=20) == 0

    def kill(self) -> None:
        """As if its machine were lost: no journal in the run's directory."""
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def serve(directory: Path) -> Iterator[Served]:
    """Serve run `r1` from `directory`, whose state lies there too; XDG_STATE_HOME must say so already."""
    assert os.environ["XDG_STATE_HOME"].startswith(str(directory))
    token = directory / "token"
    token.touch(mode=0o600)
    token.write_text(TOKEN)
    port = free_port()
    options = ["--run-id", "r1", "--port", str(port), "--metrics-port", "0", "--token-file", "token"]
    with (directory / "coordinator.log").open("wb") as log:
        process = subprocess.Popen([*COMMAND, "coordinator", "serve", *options], cwd=directory, stderr=log)
    try:
        run_dir = directory / "resilience-runs" / "r1"
        wait_for(lambda: _is_ready(run_dir) or process.poll() is not None, what="the coordinator")
        assert process.poll() is None, (directory / "coordinator.log").read_text()
        (run_dir.parent / "latest").symlink_to("r1")
        found = Served(directory, port, process)
        found.join()
        yield found
    finally:
        process.kill()
        process.wait()


def _is_ready(run_dir: Path) -> bool:
    with contextlib.suppress(OSError, ValueError):
        return bool(json.loads((run_dir / "coordinator.json").read_text()))
    return False
