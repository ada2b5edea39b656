"""The coordinator as a process: access, limits, kill -9 between any two calls, the report, metrics that never fall."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from resilience.config import Config
from resilience.context import RunContext
from resilience.coordinator.devices import DeviceHistory
from resilience.coordinator.journal import open_recorded
from resilience.rpc import codec
from resilience.rpc.v1 import coordinator_pb2 as pb
from resilience.rpc.v1 import coordinator_pb2_grpc, operator_pb2_grpc
from resilience.rpc.v1 import operator_pb2 as op
from resilience.testing import detection, evidence

pytestmark = pytest.mark.integration

REPORTED = {
    *(
        "schema_version",
        "run_id",
        "versions",
        "deterministic",
        "outcome",
        "exit_code",
        "num_generations",
        "generations",
    ),
    *("num_steps", "goodput_ratio", "badput_s", "faults_injected", "detections", "decisions"),
}
REPORTED_OF_DETECTIONS = {
    *("step", "micro_step", "rank", "device", "site", "layer", "kind", "residual_ratio", "verdict", "detected_at"),
}

TOKEN = "a-token-of-enough-characters"
DEADLINE_S = 20.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Process:
    """A coordinator of its own, with its own state directory."""

    def __init__(self, tmp_path: Path, *, token: str | None = None, config: Config | None = None) -> None:
        self.run_dir = tmp_path / "run"
        self.run_dir.mkdir()
        self.state_home = tmp_path / "state"
        self.token_file: Path | None = None
        if token is not None:
            self.token_file = tmp_path / "token"
            self.token_file.touch(mode=0o600)
            self.token_file.write_text(token)
        self.port = free_port()
        context = RunContext(
            run_id="r1",
            run_dir=self.run_dir,
            coordinator_address=f"127.0.0.1:{self.port}",
            token_file=self.token_file,
            config=config or Config(),
        )
        self.context = self.run_dir / "context.json"
        context.write(self.context)
        self.process: subprocess.Popen[str] | None = None
        self._channel: grpc.Channel | None = None

    def command(self, *more: str) -> list[str]:
        return [sys.executable, "-m", "resilience.coordinator", "--context", str(self.context), *more]

    def environment(self) -> dict[str, str]:
        return {**os.environ, "XDG_STATE_HOME": str(self.state_home)}

    def start(self) -> None:
        self.process = subprocess.Popen(
            self.command("--metrics-port", "0"), env=self.environment(), stderr=subprocess.PIPE, text=True
        )
        self.close_channel()
        self._channel = grpc.insecure_channel(f"127.0.0.1:{self.port}")
        try:
            grpc.channel_ready_future(self._channel).result(DEADLINE_S)
        except grpc.FutureTimeoutError:
            self.kill()
            raise AssertionError(f"coordinator does not answer: {self.stderr()}") from None

    def stderr(self) -> str:
        assert self.process is not None
        assert self.process.stderr is not None
        return self.process.stderr.read()

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait(DEADLINE_S)

    def restart(self) -> None:
        self.kill()
        self.close_process()
        self.start()

    def end(self) -> int:
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(DEADLINE_S)

    def close_channel(self) -> None:
        if self._channel is not None:
            self._channel.close()

    def close_process(self) -> None:
        if self.process is not None:
            if self.process.poll() is None:
                self.kill()
            assert self.process.stderr is not None
            self.process.stderr.close()

    @property
    def channel(self) -> grpc.Channel:
        assert self._channel is not None
        return self._channel

    @property
    def coordinator(self) -> Any:
        return coordinator_pb2_grpc.CoordinatorStub(self.channel)

    @property
    def operator(self) -> Any:
        return operator_pb2_grpc.OperatorStub(self.channel)

    @property
    def addresses(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.run_dir / "coordinator.json").read_text())
        return found

    def journal(self) -> Path:
        return self.state_home / "resilience" / "r1" / "journal.db"

    def scrape(self) -> dict[str, float]:
        with urllib.request.urlopen(f"http://{self.addresses['metrics_address']}/metrics", timeout=5) as answer:
            lines = answer.read().decode().splitlines()
        return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if not line.startswith("#")}

    def join(self, *, last_generation: int = 0, exits: tuple[pb.RankExit, ...] = (), wait_s: float = 1.0) -> Any:
        agent = pb.AgentInfo(
            node="a",
            num_nodes=1,
            address="127.0.0.1",
            devices=[pb.Device(slot=slot, device=f"device-{slot}") for slot in range(2)],
            pid=7,
            last_generation=last_generation,
            exits=exits,
        )
        return self.coordinator.Join(pb.JoinRequest(run_id="r1", agent=agent, wait_s=wait_s))

    def report(self, *requests: pb.ReportRequest) -> list[Any]:
        return list(self.coordinator.Report(iter(requests)))


@pytest.fixture
def process(tmp_path: Path) -> Iterator[Process]:
    found = Process(tmp_path)
    found.start()
    yield found
    found.close_channel()
    found.close_process()


def failure(call: Any, *arguments: Any, **known: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        _read_all(call(*arguments, **known))
    return caught.value.code(), caught.value.details() or ""


def _read_all(answer: Any) -> None:
    """A stream fails where it is read."""
    if not hasattr(answer, "DESCRIPTOR"):
        list(answer)


def test_bad_requests_get_one_clear_line(process: Process) -> None:
    process.join()
    join = process.coordinator.Join
    code, text = failure(join, pb.JoinRequest(run_id="r2", rank=pb.RankInfo(generation=1)))
    assert (code, text) == (
        grpc.StatusCode.FAILED_PRECONDITION,
        "this coordinator serves run 'r1', not 'r2'; check the address",
    )
    code, text = failure(join, pb.JoinRequest(run_id="r1", rank=pb.RankInfo(generation=5)))
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert "generation 5, which has not begun" in text
    code, text = failure(join, pb.JoinRequest(run_id="r1", rank=pb.RankInfo(generation=1, rank=9)))
    assert code is grpc.StatusCode.NOT_FOUND
    assert "rank 9 is not one of the 2 ranks" in text
    code, text = failure(join, pb.JoinRequest(run_id="r1"))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "JoinRequest.member is not set" in text
    long = pb.LeaveRequest(run_id="r1", member="agent:a", reason="x" * (codec.MAX_STRING_BYTES + 1))
    code, text = failure(process.coordinator.Leave, long)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "LeaveRequest.reason is longer" in text
    code, text = failure(process.coordinator.Leave, pb.LeaveRequest(reason="x" * (codec.MAX_MESSAGE_BYTES + 1)))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "larger than max" in text
    bad = pb.ReportRequest(run_id="r1", generation=1, member="rank:0", sequence=1, detections=[pb.Detection()])
    code, text = failure(process.coordinator.Report, iter([bad]))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "Detection.check = 0" in text
    code, text = failure(process.operator.ExplainDecision, op.ExplainDecisionRequest(decision_id="g1-s1-a0"))
    assert code is grpc.StatusCode.NOT_FOUND
    assert process.operator.GetRun(op.GetRunRequest()).state == "training", "nothing was lost by that"


def test_health_and_reflection_answer(process: Process) -> None:
    health = health_pb2_grpc.HealthStub(process.channel)
    for service in ("", "resilience.rpc.v1.Coordinator", "resilience.rpc.v1.Operator"):
        answer = health.Check(health_pb2.HealthCheckRequest(service=service))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    stub = reflection_pb2_grpc.ServerReflectionStub(process.channel)
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    (answer,) = stub.ServerReflectionInfo(iter([request]))
    names = {service.name for service in answer.list_services_response.service}
    assert {"resilience.rpc.v1.Coordinator", "resilience.rpc.v1.Operator"} <= names


def test_the_token_is_required_by_everything_but_probes(tmp_path: Path) -> None:
    process = Process(tmp_path, token=TOKEN)
    process.start()
    try:
        get = process.operator.GetRun
        assert failure(get, op.GetRunRequest())[0] is grpc.StatusCode.UNAUTHENTICATED
        wrong = [("authorization", "Bearer wrong")]
        assert failure(get, op.GetRunRequest(), metadata=wrong)[0] is grpc.StatusCode.PERMISSION_DENIED
        report = pb.ReportRequest(run_id="r1", member="rank:0")
        assert failure(process.coordinator.Report, iter([report]))[0] is grpc.StatusCode.UNAUTHENTICATED
        events = process.operator.StreamEvents
        assert failure(events, op.StreamEventsRequest())[0] is grpc.StatusCode.UNAUTHENTICATED
        right = [("authorization", f"Bearer {TOKEN}")]
        assert get(op.GetRunRequest(), metadata=right).run_id == "r1"
        health = health_pb2_grpc.HealthStub(process.channel)
        assert health.Check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.SERVING
        assert TOKEN not in (process.run_dir / "coordinator.json").read_text()
    finally:
        process.close_channel()
        process.close_process()


@pytest.mark.parametrize(
    ("trouble", "text"),
    [
        ("busy", "cannot be used (Address already in use); choose another port"),
        ("open", "is open to other machines and there is no token"),
        ("readable token", "has mode 0644, others can read it; chmod 600"),
        ("short token", "at least 16 are required"),
        ("no context", "run context cannot be read"),
        ("state", "cannot be opened"),
    ],
)
def test_what_cannot_start_says_why_in_one_line(tmp_path: Path, trouble: str, text: str) -> None:
    config = Config.model_validate({"coordinator": {"bind": "0.0.0.0"}}) if trouble == "open" else Config()
    token = TOKEN if trouble == "readable token" else "short" if trouble == "short token" else None
    process = Process(tmp_path, token=token, config=config)
    with contextlib.ExitStack() as stack:
        if trouble == "busy":
            holder = stack.enter_context(socket.socket())
            holder.bind(("127.0.0.1", process.port))
            holder.listen()
        if trouble == "readable token":
            assert process.token_file is not None
            process.token_file.chmod(0o644)
        if trouble == "no context":
            process.context.unlink()
        if trouble == "state":
            process.state_home.write_text("a file, not a directory")
        done = subprocess.run(
            process.command(),
            env=process.environment(),
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=False,
        )
    assert done.returncode == (1 if trouble == "state" else 64), done.stderr
    assert text in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert not process.journal().exists()


def test_kill_between_any_two_calls_loses_nothing(process: Process) -> None:
    assert process.join().status == pb.JoinResponse.READY
    process.restart()
    assert process.join().assignment.generation == 1, "the same place again"
    rank = pb.RankInfo(generation=1, rank=0, world_size=2, node="a", pid=5, versions={"torch": "2.13.0"})
    process.coordinator.Join(pb.JoinRequest(run_id="r1", rank=rank))
    found = detection(step=3)
    asked = codec.to_proto(evidence(found, step=3, run_id="r1"))
    first = process.coordinator.Decide(pb.DecideRequest(evidence=asked)).decision
    process.restart()
    again = process.coordinator.Decide(pb.DecideRequest(evidence=asked)).decision
    assert again == first
    beat = pb.Heartbeat(step=3, state="training", step_seconds_since=[0.5, 0.25], residual_ratios=[0.01])
    request = pb.ReportRequest(run_id="r1", generation=1, member="rank:0", sequence=1, heartbeat=beat)
    assert [answer.acknowledged for answer in process.report(request)] == [1]
    before = process.scrape()
    process.restart()
    after = process.scrape()
    assert before['resilience_steps_total{run="r1"}'] == 2
    fallen = {
        name: (value, after.get(name))
        for name, value in before.items()
        if ("_total" in name or "_bucket" in name or "_count" in name) and after.get(name, -1.0) < value
    }
    assert not fallen
    clean = codec.to_proto(evidence(step=3, run_id="r1", attempt=1, previous=[found]))
    second = process.coordinator.Decide(pb.DecideRequest(evidence=clean)).decision
    assert second.action == pb.ACTION_CONTINUE
    process.restart()
    (settled,) = process.operator.ListDetections(op.ListDetectionsRequest()).detections
    assert settled.verdict == pb.VERDICT_TRANSIENT
    exits = (pb.RankExit(generation=1, rank=1, node="a", device="device-1", exit_code=-9),)
    assert process.join(last_generation=1, exits=exits).assignment.generation == 2
    process.restart()
    assert process.join(last_generation=1, exits=exits).assignment.generation == 2, "no third one"
    live = process.operator.GetRun(op.GetRunRequest())
    recorded = open_recorded(process.journal())
    assert (recorded.machine.state.generation, live.generation) == (2, 2)
    assert list(recorded.machine.state.decisions) == ["g1-s3-a0", "g1-s3-a1", "g1-exit"]
    history = DeviceHistory(process.state_home / "resilience" / "devices.db")
    assert [(record.device, record.num_transient) for record in history.records()] == [("device-0", 1)]
    history.close()


def test_a_held_join_is_answered_at_once_when_the_run_ends(process: Process) -> None:
    process.join()
    done = tuple(pb.RankExit(generation=1, rank=rank, node="a", exit_code=0) for rank in range(2))
    began = time.monotonic()
    answer = process.join(last_generation=1, exits=done, wait_s=20.0)
    assert (answer.status, answer.exit_code) == (pb.JoinResponse.STOP, 0)
    assert time.monotonic() - began < 10


def test_orders_come_down_the_stream_without_being_asked_for(process: Process) -> None:
    process.join()
    hello = pb.ReportRequest(run_id="r1", generation=1, member="agent:a", sequence=1)
    outgoing = iter_until_closed([hello])
    stream = process.coordinator.Report(outgoing)
    assert not next(stream).directives
    exits = [pb.RankExit(generation=1, rank=1, node="a", device="device-1", exit_code=-9)]
    process.report(pb.ReportRequest(run_id="r1", generation=1, member="agent:a", sequence=2, exits=exits))
    (directive,) = next(stream).directives
    assert directive.restart.ended_generation == 1
    assert "SIGKILL" in directive.restart.reason
    assert directive.expires_at > time.time()
    stream.cancel()


def iter_until_closed(requests: list[pb.ReportRequest]) -> Iterator[pb.ReportRequest]:
    import threading

    yield from requests
    threading.Event().wait(DEADLINE_S)


def test_the_report_tells_the_run(process: Process) -> None:
    process.join()
    strike = pb.Strike(strike_id="f0-n1", step=1, rank=0, site="linear.out", kind="inf", struck_at=1.5)
    found = codec.to_proto(detection(step=1, mended=True))
    beat = pb.Heartbeat(step=1, step_seconds_since=[0.5])
    news = pb.ReportRequest(
        run_id="r1",
        generation=1,
        member="rank:0",
        sequence=1,
        strikes=[strike],
        detections=[found],
        deterministic=True,
        heartbeat=beat,
    )
    process.report(news)
    follow = process.operator.StreamEvents(op.StreamEventsRequest(follow=True))
    kinds = [next(follow).kind for _ in range(5)]
    assert kinds == ["note", "member", "generation", "strike", "detection"]
    process.coordinator.Leave(pb.LeaveRequest(run_id="r1", generation=1, member="agent:a", exit_code=93, reason="data"))
    process.coordinator.Leave(pb.LeaveRequest(run_id="r1", member="launcher", exit_code=93, reason="data"))
    assert [event.kind for event in follow] == ["member", "finished"]
    assert process.end() == 0
    report = json.loads((process.run_dir / "report.json").read_text())
    assert report.keys() >= REPORTED
    assert (report["outcome"], report["exit_code"], report["deterministic"]) == ("do_not_requeue", 93, True)
    assert report["faults_injected"][0]["struck_at"] == 1.5
    assert {
        "step",
        "micro_step",
        "rank",
        "device",
        "site",
        "layer",
        "kind",
        "residual_ratio",
        "verdict",
        "detected_at",
    } <= (report["detections"][0].keys())
    assert open_recorded(process.run_dir / "journal.db").machine.state.finished is not None


def test_a_run_that_is_cut_off_leaves_a_report_too(process: Process) -> None:
    process.join()
    assert process.end() == 0
    report = json.loads((process.run_dir / "report.json").read_text())
    assert (report["outcome"], report["exit_code"]) == ("interrupted", 75)
    assert "SIGTERM" in report["reason"]


def test_a_cordon_outlives_the_job(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    first = Process(tmp_path / "one")
    first.state_home = tmp_path / "state"
    first.start()
    first.join()
    request = op.SetCordonRequest(target="a", cordoned=True, reason="runs hot")
    assert list(first.operator.SetCordon(request).devices) == ["device-0", "device-1"]
    first.end()
    first.close_channel()
    first.close_process()
    (tmp_path / "two").mkdir()
    second = Process(tmp_path / "two")
    second.state_home = tmp_path / "state"
    second.context.write_text(second.context.read_text().replace('"r1"', '"r2"'))
    second.start()
    try:
        agent = pb.AgentInfo(node="b", num_nodes=1, devices=[pb.Device(device="device-1")], pid=1)
        answer = second.coordinator.Join(pb.JoinRequest(run_id="r2", agent=agent, wait_s=1))
        assert (answer.status, answer.exit_code) == (pb.JoinResponse.STOP, 75)
        assert "device device-1 is cordoned: runs hot" in answer.reason
        listed = {
            d.device: (d.cordoned, d.reason) for d in second.operator.ListDevices(op.ListDevicesRequest()).devices
        }
        assert listed["device-0"] == (True, "runs hot")
        back = op.SetCordonRequest(target="device-0", cordoned=False, reason="mended")
        assert list(second.operator.SetCordon(back).devices) == ["device-0"]
        listed = {
            d.device: (d.cordoned, d.reason) for d in second.operator.ListDevices(op.ListDevicesRequest()).devices
        }
        assert listed["device-0"] == (False, "")
    finally:
        second.close_channel()
        second.close_process()
