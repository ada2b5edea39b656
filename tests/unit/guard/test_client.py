"""The client against a real gRPC server that dies and comes back."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest

from resilience.config import Config
from resilience.context import RunContext
from resilience.events import Action, Check, Decision, Detection, DetectionKind, Evidence
from resilience.guard.client import Client, RankIdentity
from resilience.guard.line import LineToCoordinator
from resilience.rpc.codec import to_proto
from resilience.rpc.v1 import coordinator_pb2 as pb
from resilience.rpc.v1 import coordinator_pb2_grpc as pb_grpc

IDENTITY = RankIdentity(
    generation=3,
    rank=1,
    local_rank=1,
    world_size=2,
    node="a",
    device="gpu-1",
    device_name="GPU",
    pid=1,
    versions={"torch": "2.13"},
)
DECISION = Decision(decision_id="g3-s5-a0", generation=3, step=5, attempt=0, action=Action.REPLAY, reason="because")
EVIDENCE = Evidence(run_id="run", generation=3, step=5, attempt=0, world_size=2, detections=())


def detection(number: int) -> Detection:
    return Detection(
        detection_id=f"g3-r1-{number}",
        generation=3,
        step=5,
        micro_step=0,
        attempt=0,
        rank=1,
        node="a",
        device="gpu-1",
        site="gradient",
        layer=0,
        check=Check.NORM,
        kind=DetectionKind.NORM_SPIKE,
        residual_ratio=3.0,
    )


class Service(pb_grpc.CoordinatorServicer):
    """Keeps what it hears. `acknowledges` off: as if it died before its journal was written."""

    def __init__(self) -> None:
        self.joined: list[pb.JoinRequest] = []
        self.reports: list[pb.ReportRequest] = []
        self.concluded: list[str] = []
        self.left: list[pb.LeaveRequest] = []
        self.tokens: set[str] = set()
        self.directives: list[pb.Directive] = []
        self.acknowledges = True
        self.ended_generation = 0
        self.decides = True

    def Join(self, request: pb.JoinRequest, context: Any) -> pb.JoinResponse:
        self.tokens.add(dict(context.invocation_metadata()).get("authorization", ""))
        if request.rank.generation <= self.ended_generation:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, "generation 3 has ended")
        self.joined.append(request)
        return pb.JoinResponse(status=pb.JoinResponse.READY, consecutive_skips=2, deterministic=True)

    def Report(self, requests: Iterator[pb.ReportRequest], context: Any) -> Iterator[pb.ReportResponse]:
        for request in requests:
            self.reports.append(request)
            if self.acknowledges:
                yield pb.ReportResponse(acknowledged=request.sequence, directives=self.directives)

    def Decide(self, request: pb.DecideRequest, context: Any) -> pb.DecideResponse:
        if not self.decides:
            threading.Event().wait(1.0)
        return pb.DecideResponse(decision=to_proto(DECISION))

    def Conclude(self, request: pb.ConcludeRequest, context: Any) -> pb.ConcludeResponse:
        self.concluded.append(request.decision.decision_id)
        return pb.ConcludeResponse()

    def Leave(self, request: pb.LeaveRequest, context: Any) -> pb.LeaveResponse:
        self.left.append(request)
        return pb.LeaveResponse()

    def detections(self) -> list[str]:
        return [found.detection_id for report in self.reports for found in report.detections]


class Place:
    """A run directory in which coordinators come and go."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        (directory / "token").write_text("secret\n", encoding="utf-8")
        self.service = Service()
        self._server: grpc.Server | None = None
        self.context = RunContext(
            run_id="run",
            run_dir=directory,
            coordinator_address="127.0.0.1:1",
            token_file=directory / "token",
            config=Config.model_validate({"coordinator": {"heartbeat_interval_s": 0.05}}),
        )

    def start(self) -> Service:
        self.service = Service()
        self._server = grpc.server(futures.ThreadPoolExecutor(8))
        pb_grpc.add_CoordinatorServicer_to_server(self.service, self._server)
        port = self._server.add_insecure_port("127.0.0.1:0")
        self._server.start()
        (self.directory / "coordinator.json").write_text(json.dumps({"address": f"127.0.0.1:{port}"}))
        return self.service

    def kill(self) -> None:
        if self._server is not None:
            self._server.stop(None).wait()
        self._server = None


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    place = Place(tmp_path)
    place.start()
    yield place
    place.kill()


@pytest.fixture
def client(place: Place) -> Iterator[Client]:
    client = Client(place.context, IDENTITY)
    client.start()
    yield client
    client.leave(0, "the test ended", timeout_s=0.5)


def until(condition: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, f"waited for {what}"
        time.sleep(0.01)


def test_it_announces_itself_with_the_token_and_reports(place: Place, client: Client) -> None:
    client.report(detection(1))
    client.heartbeat(step=4, state="training", checks={"linear.out": 7}, step_seconds=0.5)
    until(lambda: any(report.heartbeat.step == 4 for report in place.service.reports), "the heartbeat")
    until(lambda: place.service.detections() == ["g3-r1-1"], "the detection")
    assert place.service.joined[0].rank.device.device == "gpu-1"
    assert place.service.tokens == {"Bearer secret"}
    durations = [seconds for report in place.service.reports for seconds in report.heartbeat.step_seconds_since]
    assert durations == [0.5], "each step's duration is sent once"


def test_what_was_not_acknowledged_is_sent_again_to_the_next_coordinator(place: Place, client: Client) -> None:
    place.service.acknowledges = False
    client.report(detection(1))
    until(lambda: place.service.detections(), "the detection")
    place.kill()
    client.report(detection(2))
    client.conclude(DECISION)
    service = place.start()
    until(lambda: service.detections() == ["g3-r1-1", "g3-r1-2"], "both detections")
    until(lambda: service.concluded == ["g3-s5-a0"], "the conclusion")
    sequences = [report.sequence for report in service.reports if report.detections]
    assert sequences == sorted(sequences)


def test_decide_answers_within_its_deadline_or_not_at_all(place: Place, client: Client) -> None:
    until(client.joined.is_set, "the announcement")
    until(lambda: client.decide(EVIDENCE, 5.0) == DECISION, "a decision")
    place.service.decides = False
    began_at = time.monotonic()
    assert client.decide(EVIDENCE, 0.2) is None
    assert time.monotonic() - began_at < 0.9
    place.kill()
    began_at = time.monotonic()
    assert client.decide(EVIDENCE, 0.2) is None
    assert time.monotonic() - began_at < 0.9


def test_orders_reach_the_training_thread(place: Place, client: Client) -> None:
    line = LineToCoordinator(client)
    until(lambda: line.orders().inherited_skips == 2, "the answer to the announcement")
    assert line.orders().deterministic
    assert not line.orders().drain
    place.service.directives = [
        pb.Directive(directive_id="late", expires_at=1.0, stop=pb.Stop(exit_code=75)),
        pb.Directive(directive_id="d", expires_at=time.time() + 60, drain=pb.Drain(reason="asked")),
    ]
    until(lambda: line.orders().drain, "the drain")
    assert line.orders().reason == "asked"
    assert line.orders().stop_code == 0, "an order that has expired is not obeyed"
    place.service.directives = [
        pb.Directive(directive_id="s", expires_at=time.time() + 60, stop=pb.Stop(exit_code=93, reason="enough"))
    ]
    until(lambda: line.orders().stop_code == 93, "the stop")


def test_a_stale_generation_is_told_so(place: Place) -> None:
    place.service.ended_generation = 3
    client = Client(place.context, IDENTITY)
    client.start()
    until(lambda: LineToCoordinator(client).orders().fenced, "the fence")
    assert client.fenced_reason == "generation 3 has ended"
    client.leave(75, "fenced", timeout_s=0.5)
    assert place.service.left == [], "nothing more is said for a generation that has ended"


def test_leaving_delivers_what_is_left_and_the_last_heartbeat(place: Place, client: Client) -> None:
    until(client.joined.is_set, "the announcement")
    line = LineToCoordinator(client)
    line.heartbeat(step=9)
    line.report(detection(4))
    line.leave(0, "the script ended")
    line.leave(1, "not twice")
    assert [(left.exit_code, left.member) for left in place.service.left] == [(0, "rank:1")]
    assert place.service.detections() == ["g3-r1-4"]
    assert place.service.reports[-1].heartbeat.step == 9
    assert place.service.reports[-1].heartbeat.state == "done"


def test_leaving_is_bounded_without_a_coordinator(place: Place) -> None:
    place.kill()
    client = Client(place.context, IDENTITY)
    client.start()
    client.report(detection(1))
    began_at = time.monotonic()
    client.leave(0, "the script ended", timeout_s=0.4)
    assert time.monotonic() - began_at < 1.5
