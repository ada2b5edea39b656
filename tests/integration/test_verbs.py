"""Every verb of the command, by name, on a coordinator that answers and on one that does not. A new verb fails here
until it is added below, to the help's examples and, with its JSON, to docs/cli.md."""

from __future__ import annotations

import dataclasses
import json
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from resilience.cli.examples import HELP, verbs
from resilience.cli.main import app, main
from resilience.events import CheckpointFact, CheckpointKind, SnapshotFact, SnapshotKind
from resilience.rpc.codec import to_proto
from resilience.rpc.v1 import coordinator_pb2 as pb
from resilience.testing import detection
from tests.integration.harness import free_port, wait_for
from tests.integration.served import COMMAND, Served, serve

pytestmark = pytest.mark.integration

DECISION = "g1-s5-a0"
ASKS = {
    "status": [],
    "top": [],
    "ranks": [],
    "detections": ["--all"],
    "decisions": [],
    "explain": [DECISION],
    "events": [],
    "snapshots": [],
    "devices": [],
    "report": [],
    "checkpoints list": [],
    "checkpoints verify": [],
    "doctor": [],
    "cordon": ["device-1", "--reason", "a test"],
    "uncordon": ["device-1", "--reason", "a test"],
    "snapshot now": ["--reason", "a test"],
    "rewind": ["--step", "4"],
    "watch": ["--lines", "0"],
    "drain": ["--reason", "a test"],
}
"""Verbs that ask a coordinator, with what they are given, in the order in which one run can bear them."""
ASKS_NOBODY = {
    "policy show": (0, []),
    "policy check": (0, ["settings.toml"]),
    "policy simulate": (0, ["--mended"]),
    "checkpoints prune": (0, ["ck", "--dry-run"]),
    "checkpoints convert": (1, ["nowhere", "--world-size", "2"]),
    "digest": (1, ["nowhere"]),
    "calibrate": (64, []),
}
"""Verbs to which it is all the same who answers for the latest run: what they end with, what they are given."""
SERVES = {"coordinator serve"}
FOLLOWS = {"watch"}
"""Ends when the run does, so it is looked at while others order things."""
DOCUMENT = Path(__file__).parents[2] / "docs" / "cli.md"


def documented_keys() -> dict[str, set[str]]:
    """Verb -> the keys of its JSON, as docs/cli.md has them."""
    rows = re.findall(r"^\| `([^`]+)` \| an? (?:object|list of objects)[^|]*\| ([^|]+) \|$", DOCUMENT.read_text(), re.M)
    return {verb: set(keys.split(", ")) for verb, keys in rows}


def words_of(verb: str) -> list[str]:
    return [*verb.split(), *ASKS.get(verb, []), "--json"]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    directory = tmp_path_factory.mktemp("live")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(directory / "state"))
        with serve(directory) as found:
            _something_of_everything(found)
            with found.training():  # or the node counts as lost before the last verb has been asked
                yield found


def _something_of_everything(served: Served) -> None:
    saved = CheckpointFact(
        kind=CheckpointKind.PUBLISHED,
        directory=str(_checkpoint(served.directory).parent),
        tag="step4",
        step=4,
        generation=1,
        last_verified_step=4,
    )
    taken = SnapshotFact(
        kind=SnapshotKind.TAKEN, step=4, generation=1, node="a", num_bytes=5 << 20, clean_through=2, seconds=0.1, at=1.0
    )
    alarm = to_proto(dataclasses.replace(detection(step=5), device="device-0"))
    served.report(
        heartbeat=pb.Heartbeat(step=4, loss=2.5, state="training"),
        checkpoints=[to_proto(saved)],
        snapshots=[to_proto(taken)],
        detections=[alarm],
    )
    assert served.decide(5, alarm).decision_id == DECISION


def _checkpoint(directory: Path) -> Path:
    tag_dir = directory / "ck" / "step4"
    tag_dir.mkdir(parents=True)
    (tag_dir / "mp_rank_00_model_states.pt").write_bytes(b"seen to be there, and no more")
    return tag_dir


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path


@pytest.fixture
def live(served: Served, monkeypatch: pytest.MonkeyPatch) -> Served:
    monkeypatch.chdir(served.directory)
    monkeypatch.setenv("XDG_STATE_HOME", str(served.directory / "state"))
    return served


def asked(capsys: pytest.CaptureFixture[str], words: list[str]) -> tuple[int, str, str]:
    code = main(words)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_no_verb_is_forgotten() -> None:
    known = {words for words, _ in verbs(app)}
    assert known == set(ASKS) | set(ASKS_NOBODY) | SERVES, "say in this file what the verb is to do live and dead"
    assert known == set(HELP)
    assert documented_keys().keys() == {*ASKS, *ASKS_NOBODY}


def test_who_asks_a_coordinator_takes_its_address() -> None:
    takes = {
        words for words, verb in verbs(app) if "address" in (verb.callback.__annotations__ if verb.callback else {})
    }
    assert takes == set(ASKS)


# ------ a coordinator that answers


@pytest.mark.parametrize("verb", [verb for verb in ASKS if verb not in FOLLOWS])
def test_live(verb: str, live: Served, capsys: pytest.CaptureFixture[str]) -> None:
    if verb == "snapshot now":
        live.obey(step=5)
    code, out, err = asked(capsys, words_of(verb))
    assert code == (1 if verb == "doctor" and '"fail"' in out else 0), err
    assert err == ""
    answer = [json.loads(line) for line in out.splitlines()] if verb == "events" else json.loads(out)
    if verb == "report":  # the report has a test of its own, and may say more than the page
        assert keys_of(answer) >= documented_keys()[verb]
    else:
        assert keys_of(answer) == documented_keys()[verb]


@pytest.mark.parametrize("verb", ASKS_NOBODY)
def test_what_asks_nobody_does_not_mind_who_is_there(
    verb: str, live: Served, capsys: pytest.CaptureFixture[str]
) -> None:
    _answers_itself(verb, capsys)


def test_watch_ends_with_the_run_and_as_it_did(live: Served) -> None:
    watcher = subprocess.Popen(
        [*COMMAND, "watch", "--lines", "0", "--json"], cwd=live.directory, stdout=subprocess.PIPE, text=True
    )
    try:
        assert watcher.stdout is not None
        first = json.loads(watcher.stdout.readline())
        assert first["sequence"] == 1
        assert set(first) == documented_keys()["watch"]
        live.report(notes=[pb.Note(kind="warning", message="while it is watched")])
        live.finish(75)
        out, _ = watcher.communicate(timeout=30)
    finally:
        watcher.kill()
    assert "while it is watched" in out
    assert json.loads(out.splitlines()[-1])["kind"] == "finished"
    assert watcher.returncode == 75


# ------ a coordinator that does not


@pytest.fixture
def dead(here: Path) -> str:
    """The address in ./resilience-runs/latest, at which nobody is, and no journal."""
    address = f"127.0.0.1:{free_port()}"
    run_dir = here / "resilience-runs" / "latest"
    run_dir.mkdir(parents=True)
    content = {"address": address, "metrics_address": None, "pid": 1, "token_file": None, "run_id": "r1", "tls": None}
    (run_dir / "coordinator.json").write_text(json.dumps(content))
    return address


@pytest.mark.parametrize("verb", ASKS)
@pytest.mark.parametrize("how", ["--address", "--run-dir"])
def test_dead(verb: str, how: str, dead: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = [how, dead if how == "--address" else "resilience-runs/latest"]
    code, out, err = asked(capsys, [*words_of(verb), *given])
    assert (code, out) == (69, "")
    assert err.startswith(f"resilience: coordinator {dead}")
    assert "does not answer" in err
    assert err.count("\n") == 1


@pytest.mark.usefixtures("dead")
@pytest.mark.parametrize("verb", ASKS_NOBODY)
def test_what_asks_nobody_works_all_the_same(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    _answers_itself(verb, capsys)


def _answers_itself(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    if not Path("ck").exists():
        _checkpoint(Path.cwd())
    Path("settings.toml").write_text("[policy]\nmax_restarts = 7\n")
    expected, words = ASKS_NOBODY[verb]
    code, out, err = asked(capsys, [*verb.split(), *words, "--json"])
    assert code == expected, err
    if code == 0:
        answer = json.loads(out)
        assert keys_of(answer) == documented_keys()[verb] or verb == "policy check"
    else:
        assert (out, err.count("\n")) == ("", 1)


def test_a_coordinator_that_was_killed_is_served_again_and_top_finds_it(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serve(here) as served:
        options = ["--run-id", "r1", "--port", str(served.port), "--metrics-port", "0", "--token-file", "token"]
        busy = subprocess.run([*COMMAND, "coordinator", "serve", *options], capture_output=True, text=True, timeout=60)
        assert (busy.returncode, str(served.port) in busy.stderr.splitlines()[-1]) == (64, True)
        served.report(notes=[pb.Note(kind="warning", message="before the end")])
        served.kill()
        code, out, err = asked(capsys, ["watch"])
        assert code == 69, "its journal does not tell how the run ended"
        assert "before the end" in out
        assert "how the run ended" in err.splitlines()[-1]
        again = subprocess.Popen([*COMMAND, "coordinator", "serve", *options], stderr=subprocess.DEVNULL)
        try:
            address = ["--address", served.address, "--token-file", "token"]
            wait_for(lambda: main(["status", *address]) == 0, what="the coordinator that came back")
            capsys.readouterr()
            code, out, _ = asked(capsys, ["top", "--once"])
            assert code == 0
            assert "before the end" in out
        finally:
            again.send_signal(signal.SIGTERM)
            assert again.wait(timeout=20) == 0


def keys_of(answer: Any) -> set[str]:
    """Keys of an object, or of the objects in a list."""
    if isinstance(answer, dict):
        return set(answer)
    assert answer, "an empty list shows no keys"
    return set(answer[0])
