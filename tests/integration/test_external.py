"""A coordinator of its own, as deploy/ starts it: certificates on both sides, probes, a log in JSON, spans."""

from __future__ import annotations

import concurrent.futures
import json
import os
import shutil
import signal
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from tests.integration.harness import BIN, SCRIPTS, free_port, launched, resilience, wait_for

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificates"),
]

MAKE = Path(__file__).parents[2] / "deploy" / "make-certificates"
TOKEN = "a-token-that-is-long-enough"


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps the spans that arrive."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self._server = grpc.server(concurrent.futures.ThreadPoolExecutor(2))
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port("127.0.0.1:0")
        self._server.start()

    def Export(self, request: Any, context: grpc.ServicerContext) -> Any:
        for resource in request.resource_spans:
            for scope in resource.scope_spans:
                self.spans.extend(scope.spans)
        return trace_service_pb2.ExportTraceServiceResponse()

    def close(self) -> None:
        self._server.stop(0).wait(10)


class External:
    """`resilience coordinator serve` for run `ext`, with its own state."""

    def __init__(self, directory: Path, collector: Collector) -> None:
        self.directory = directory
        self.run_dir = directory / "coordinator-run"
        self.port, self.metrics_port = free_port(), free_port()
        self.log = directory / "coordinator.log"
        self.certificates = directory / "certificates"
        for name, *hosts in (("coordinator", "127.0.0.1"), ("node",)):
            subprocess.run([MAKE, self.certificates, name, *hosts], check=True, capture_output=True, timeout=60)
        self.token = directory / "token"
        self.token.touch(mode=0o600)
        self.token.write_text(TOKEN)
        config = {**self.tls("coordinator"), "log": "json", "traces": "otlp"}
        (directory / "coordinator.json").write_text(json.dumps({"coordinator": config}))
        words = ["--run-id", "ext", "--run-dir", self.run_dir, "--token-file", self.token]
        words += ["--config", directory / "coordinator.json"]
        words += ["--port", str(self.port), "--metrics-port", str(self.metrics_port)]
        environment = {
            **os.environ,
            "XDG_STATE_HOME": str(directory / "coordinator-state"),
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{collector.port}",
        }
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(
                [BIN / "resilience", "coordinator", "serve", *words], stderr=out, env=environment
            )
        wait_for(lambda: self.answer("/readyz")[0] == 200, what=f"a coordinator: {self.log.read_text()}", timeout_s=30)

    def tls(self, name: str) -> dict[str, str]:
        at = self.certificates
        return {"tls_ca": str(at / "ca.crt"), "tls_cert": str(at / f"{name}.crt"), "tls_key": str(at / f"{name}.key")}

    def answer(self, path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}{path}", timeout=5) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError:
            return 0, ""

    def end(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.close()


@pytest.fixture
def external(tmp_path: Path, collector: Collector) -> Iterator[External]:
    external = External(tmp_path, collector)
    yield external
    if external.process.poll() is None:
        external.process.kill()
        external.process.wait(10)


def test_a_run_with_a_coordinator_of_its_own_from_certificates_to_spans(
    tmp_path: Path, external: External, collector: Collector
) -> None:
    settings = {"address": f"127.0.0.1:{external.port}", "token_file": str(external.token), **external.tls("node")}
    lines = [f"{name} = {json.dumps(value)}" for name, value in settings.items()]
    config = "\n".join(["[launch]", 'run_id = "ext"', "[coordinator]", *lines])
    arguments = ["--steps", "12", "--exit-at", "6", "--exit-code", "-9"]
    with launched(tmp_path / "job", script=SCRIPTS / "collective.py", script_args=arguments, resilience=config) as run:
        assert run.wait() == 0, run.output()
        assert "generation 2" in run.output()
        shown = resilience("status", "--json", "--run-dir", str(run.run_dir), cwd=tmp_path)
        assert shown.returncode == 0, shown.stderr
        assert json.loads(shown.stdout)["run_id"] == "ext"
        run.assert_nothing_left()
    # Without a certificate nobody is let in, whatever token he has.
    bare = resilience("status", "--address", settings["address"], "--token-file", str(external.token), cwd=tmp_path)
    assert bare.returncode == 69, bare.stdout
    assert external.answer("/healthz") == (200, "ok\n")
    assert external.answer("/nothing")[0] == 404
    assert 'resilience_generation{run="ext"} 2.0' in external.answer("/metrics")[1]
    report = external.run_dir / "report.json"
    wait_for(report.exists, what="the report of a run that has ended, of a coordinator that goes on", timeout_s=20)
    assert external.end() == 0
    assert json.loads(report.read_text())["exit_code"] == 0
    _assert_log(external.log.read_text().splitlines())
    found = {span.name: span for span in collector.spans}
    assert set(found) == {"run", "recovery restart"}
    restart = found["recovery restart"]
    assert (restart.trace_id, restart.parent_span_id) == (found["run"].trace_id, found["run"].span_id)
    assert restart.end_time_unix_nano > restart.start_time_unix_nano >= found["run"].start_time_unix_nano
    about = {each.key: each.value for each in restart.attributes}
    assert about["resilience.decision_id"].string_value == "g1-exit"
    # The script has no engine, so nobody saw a first step of the second generation.
    assert about["resilience.outcome"].string_value == "pending"


def _assert_log(lines: list[str]) -> None:
    events = [json.loads(line) for line in lines]
    assert {event["run"] for event in events} == {"ext"}
    kinds = [event["event"] for event in events]
    assert kinds[-1] == "finished"
    assert kinds.count("generation") == 2
    decided = {event.get("decision_id") for event in events if "g1-exit" in event["message"]}
    assert decided == {"g1-exit"}
    (second,) = (event for event in events if event["event"] == "generation" and event["generation"] == 2)
    assert second["decision_id"] == "g1-exit"
