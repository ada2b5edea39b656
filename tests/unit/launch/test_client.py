"""The client against a real gRPC server that goes away and comes back."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest

from resilience.context import RunContext
from resilience.errors import CoordinatorUnreachableError, ResilienceError, UsageError
from resilience.events import RankExit
from resilience.launch.client import CoordinatorClient, ReportStream, is_reachable
from resilience.launch.network import free_port
from resilience.rpc.v1 import coordinator_pb2 as pb
from resilience.rpc.v1 import coordinator_pb2_grpc as rpc

READY = pb.JoinResponse(status=pb.JoinResponse.READY, assignment=pb.Assignment(generation=1))
EXIT = RankExit(generation=1, rank=1, node="n", device="d", exit_code=-9)


class Servicer(rpc.CoordinatorServicer):
    """Answers from a script, remembers what it was told."""

    def __init__(self) -> None:
        self.answers: list[pb.JoinResponse] = [READY]
        self.acknowledges = True
        self.directives: list[pb.Directive] = []
        self.reports: list[pb.ReportRequest] = []
        self.metadata: list[dict[str, Any]] = []
        self.refuse: grpc.StatusCode | None = None

    def Join(self, request: pb.JoinRequest, context: grpc.ServicerContext) -> pb.JoinResponse:
        self.metadata.append(dict(context.invocation_metadata()))
        if self.refuse is not None:
            context.abort(self.refuse, "another run's id; check the address")
        return self.answers.pop(0)

    def Report(
        self, requests: Iterator[pb.ReportRequest], context: grpc.ServicerContext
    ) -> Iterator[pb.ReportResponse]:
        for request in requests:
            self.reports.append(request)
            acknowledged = request.sequence if self.acknowledges else 0
            yield pb.ReportResponse(acknowledged=acknowledged, directives=self.directives)


@contextlib.contextmanager
def serving(servicer: Servicer, port: int) -> Iterator[None]:
    server = grpc.server(futures.ThreadPoolExecutor(4))
    rpc.add_CoordinatorServicer_to_server(servicer, server)
    assert server.add_insecure_port(f"127.0.0.1:{port}") == port
    server.start()
    try:
        yield
    finally:
        server.stop(grace=None).wait()


def wait_for(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "waited 20 s"
        time.sleep(0.01)


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def client(port: int, tmp_path: Path) -> Iterator[CoordinatorClient]:
    token = tmp_path / "token"
    token.write_text("secret\n")
    made = CoordinatorClient(
        RunContext(run_id="r", run_dir=tmp_path, coordinator_address=f"127.0.0.1:{port}", token_file=token)
    )
    yield made
    made.close()


def join(client: CoordinatorClient, *, patience_s: float = 20.0, check: Callable[[], None] = lambda: None) -> Any:
    return client.join(pb.AgentInfo(node="n"), wait_s=0.1, patience_s=patience_s, interrupted=check)


def test_join_waits_through_pending_and_shows_the_token(client: CoordinatorClient, port: int) -> None:
    servicer = Servicer()
    servicer.answers = [pb.JoinResponse(status=pb.JoinResponse.PENDING), READY]
    with serving(servicer, port):
        assert join(client).assignment.generation == 1
    assert [m["authorization"] for m in servicer.metadata] == ["Bearer secret"] * 2


def test_join_finds_a_coordinator_that_comes_back(client: CoordinatorClient, port: int) -> None:
    with contextlib.ExitStack() as later:
        tries = 0

        def check() -> None:
            nonlocal tries
            tries += 1
            if tries == 3:
                later.enter_context(serving(Servicer(), port))

        assert join(client, check=check).assignment.generation == 1
        assert tries >= 3


def test_join_gives_up_after_its_patience(client: CoordinatorClient) -> None:
    with pytest.raises(CoordinatorUnreachableError, match="silent for 0 s"):
        join(client, patience_s=0.3)


def test_join_passes_on_a_refusal_in_words(client: CoordinatorClient, port: int) -> None:
    servicer = Servicer()
    servicer.refuse = grpc.StatusCode.FAILED_PRECONDITION
    with serving(servicer, port), pytest.raises(ResilienceError, match="another run's id"):
        join(client)


def test_join_ends_when_the_agent_is_told_to(client: CoordinatorClient) -> None:
    def stop() -> None:
        raise KeyError("stopped")

    with pytest.raises(KeyError, match="stopped"):
        join(client, check=stop)


def test_leave_never_fails(client: CoordinatorClient) -> None:
    assert client.leave(generation=1, member="agent:n", exit_code=0, reason="", timeout_s=0.2) is False


def test_exits_are_told_again_until_they_are_acknowledged(client: CoordinatorClient, port: int) -> None:
    reports = ReportStream(client, member="agent:n", interval_s=0.02)
    deaf = Servicer()
    deaf.acknowledges = False
    with serving(deaf, port):
        reports.begin(1)
        reports.exits([EXIT])
        wait_for(lambda: any(report.exits for report in deaf.reports))
    back = Servicer()
    with serving(back, port):
        wait_for(lambda: any(report.exits for report in back.reports))
        assert [e.exit_code for report in back.reports for e in report.exits] == [-9]
        assert {report.generation for report in back.reports} == {1}
        wait_for(lambda: len(back.reports) > 5)
    reports.close()
    sequences = [report.sequence for report in back.reports if not report.exits]
    assert sequences == sorted(set(sequences))


def test_orders_are_kept_for_their_generation_only(client: CoordinatorClient, port: int) -> None:
    reports = ReportStream(client, member="agent:n", interval_s=0.02)
    servicer = Servicer()
    expired = pb.Directive(expires_at=1.0, stop=pb.Stop(exit_code=75))
    servicer.directives = [expired, pb.Directive(restart=pb.Restart(ended_generation=1, reason="rank 0 hangs"))]
    with serving(servicer, port):
        reports.begin(1)
        wait_for(lambda: reports.restart is not None)
        assert reports.restart is not None
        assert reports.restart.reason == "rank 0 hangs"
        assert reports.stop is None, "an expired order must not be obeyed"
        servicer.directives = [pb.Directive(restart=pb.Restart(ended_generation=1))]
        reports.begin(2)
        seen = len(servicer.reports)
        wait_for(lambda: len(servicer.reports) > seen + 3)
        assert reports.restart is None, "an order about an earlier generation must not end this one"
        servicer.directives = [pb.Directive(stop=pb.Stop(exit_code=93, reason="deterministic"))]
        wait_for(lambda: reports.stop is not None)
    reports.close()


def test_a_missing_token_is_named(tmp_path: Path) -> None:
    context = RunContext(run_id="r", run_dir=tmp_path, coordinator_address="h:1", token_file=tmp_path / "token")
    with pytest.raises(UsageError, match=r"token: token cannot be read"):
        CoordinatorClient(context)


def test_reachability(port: int) -> None:
    assert not is_reachable(f"127.0.0.1:{port}", timeout_s=0.2)
    with serving(Servicer(), port):
        assert is_reachable(f"127.0.0.1:{port}", timeout_s=5)
