"""The command against a coordinator that it started itself: `resilience coordinator serve`, and what it answers."""

from __future__ import annotations

import dataclasses
import io
import json
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from resilience.cli.main import main
from resilience.config import Config, LaunchConfig
from resilience.context import RunContext
from resilience.events import CheckpointFact, CheckpointKind, SnapshotFact, SnapshotKind
from resilience.launch import progress
from resilience.rpc.codec import to_proto
from resilience.rpc.v1 import coordinator_pb2 as pb
from resilience.testing import detection
from tests.integration.harness import wait_for
from tests.integration.served import COMMAND, Served, serve

pytestmark = pytest.mark.integration


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    with serve(tmp_path) as found:
        yield found


def asked(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(arguments)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_every_verb_is_answered_live_and_from_the_journal(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    fact = CheckpointFact(
        kind=CheckpointKind.PUBLISHED, directory="/ck", tag="t4", step=4, generation=1, last_verified_step=4
    )
    alarm = dataclasses.replace(detection(step=5), device="device-0")
    beat = pb.Heartbeat(step=4, loss=2.5, state="training")
    served.report(heartbeat=beat, checkpoints=[to_proto(fact)], detections=[to_proto(alarm)])

    code, out, err = asked(capsys, "status", "--json")
    status = json.loads(out)
    assert (code, err) == (0, "")
    assert (status["run_id"], status["generation"], status["state"]) == ("r1", 1, "training")
    assert [rank["pid"] for rank in json.loads(asked(capsys, "ranks", "--json")[1])] == [100, 101]
    assert [fact["tag"] for fact in json.loads(asked(capsys, "checkpoints", "list", "--json")[1])] == ["t4"]
    assert [each["step"] for each in json.loads(asked(capsys, "detections", "--json")[1])] == [5]
    assert json.loads(asked(capsys, "cordon", "a", "--json")[1])["devices"] == ["device-0", "device-1"]
    assert json.loads(asked(capsys, "uncordon", "device-1", "--json")[1])["devices"] == ["device-1"]
    assert asked(capsys, "explain", "g1-s9-a0")[0] == 1
    assert asked(capsys, "status", "--address", served.address)[0] == 0  # the token is that of the run
    taken = SnapshotFact(
        kind=SnapshotKind.TAKEN, step=4, generation=1, node="a", num_bytes=5 << 20, clean_through=2, seconds=0.1, at=1.0
    )
    served.report(snapshots=[to_proto(taken)])
    (snapshot,) = json.loads(asked(capsys, "snapshots", "--json")[1])
    assert (snapshot["step"], snapshot["tier"], snapshot["clean_through"]) == (4, "memory", 2)
    assert "5.0" in asked(capsys, "snapshots")[1]
    served.obey(step=5)
    code, out, _ = asked(capsys, "snapshot", "now")
    assert (code, out) == (0, "taken: all ranks have a copy of their state after step 5\n")
    served.obey(problem="no slot was free")
    code, out, err = asked(capsys, "snapshot", "now", "--json")
    assert (code, json.loads(out)["answer"]) == (1, "not_taken")
    assert "no snapshot is taken: no slot was free" in err
    assert asked(capsys, "rewind", "--step", "4", "--reason", "suspicious loss")[0] == 0
    assert "rewind to the snapshot of step 4 asked for: suspicious loss" in asked(capsys, "events")[1]
    assert asked(capsys, "drain", "--reason", "maintenance")[0] == 0
    assert json.loads(asked(capsys, "status", "--json")[1])["state"] == "draining"
    live = {verb: asked(capsys, verb, "--json")[1] for verb in ("detections", "decisions", "devices")}

    served.process.send_signal(signal.SIGTERM)
    assert served.process.wait(timeout=20) == 0
    for verb, out in live.items():
        code, recorded, err = asked(capsys, verb, "--json")
        assert (code, recorded) == (0, out)
        assert "has ended; answering read-only from" in err


def test_a_wrong_token_and_none(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = served.directory / "wrong"
    wrong.write_text("this is another one")
    code, _, err = asked(capsys, "status", "--address", served.address, "--token-file", str(wrong))
    assert code == 64
    assert "refused" in err
    (served.directory / "resilience-runs" / "latest").unlink()
    code, _, err = asked(capsys, "status", "--address", served.address)
    assert code == 64
    assert "give --token-file FILE" in err


def test_a_busy_port_is_one_line(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = asked(capsys, "coordinator", "serve", "--run-id", "r2", "--port", str(served.port))
    assert code == 64
    assert str(served.port) in err.splitlines()[-1]


def test_events_follow_a_run_as_it_goes(served: Served) -> None:
    command = [*COMMAND, "events", "--follow", "--json"]
    follower = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert follower.stdout is not None
        first = json.loads(follower.stdout.readline())
        assert first["sequence"] == 1
        served.report(notes=[pb.Note(kind="warning", message="something new")])
        timer = threading.Timer(20, follower.kill)
        timer.start()
        assert any("something new" in line for line in follower.stdout)
        timer.cancel()
    finally:
        follower.kill()
        follower.wait()
        follower.stdout.close()  # type: ignore[union-attr]


def test_progress_shows_each_event_once(served: Served) -> None:
    context = RunContext(
        run_id="r1",
        run_dir=served.directory,
        coordinator_address=served.address,
        token_file=served.token_file,
        config=Config(launch=LaunchConfig(live="auto")),
    )
    stream = io.StringIO()
    handle = progress.start(context, stream=stream)
    wait_for(lambda: "generation 1 begins" in stream.getvalue(), what="the first events", timeout_s=20)
    served.report(notes=[pb.Note(kind="warning", message="just before the end")])
    handle.stop()
    lines = stream.getvalue().splitlines()
    assert sum("just before the end" in line for line in lines) == 1
    assert len(lines) == len(set(lines))
    assert all(line.startswith("resilience: ") for line in lines)
