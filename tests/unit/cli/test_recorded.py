"""The verbs on a run that has ended: its journal answers, read-only, and says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from resilience.testing import FakeRun

from .conftest import Command

ENDED = (
    "resilience: the coordinator at 127.0.0.1:9 has ended; answering read-only from resilience-runs/latest/journal.db\n"
)


@pytest.mark.usefixtures("ended")
def test_status(command: Command) -> None:
    code, out, err = command("status")
    assert (code, err) == (0, ENDED)
    fields = dict(line.split("  ", 1) for line in out.splitlines() if line.strip())
    assert fields["run"].strip() == "run"
    assert "2 of 2 ranks" in fields["generation"]
    assert fields["faults"].strip().startswith("3 detections")


@pytest.mark.usefixtures("ended")
@pytest.mark.parametrize(
    "verb",
    [
        "status",
        "ranks",
        "detections",
        "decisions",
        "devices",
        "checkpoints list",
        "explain g1-s3-a0",
        "policy show",
        "events",
    ],
)
def test_tables_fit_80_columns(command: Command, verb: str) -> None:
    code, out, _ = command(*verb.split())
    assert code == 0
    if verb != "events":  # a line of the story stays one line
        assert max(len(line) for line in out.splitlines()) <= 80


@pytest.mark.usefixtures("ended")
def test_detections_have_the_names_of_the_report(command: Command) -> None:
    code, out, _ = command("detections", "--json")
    found = json.loads(out)
    assert code == 0
    assert [(d["step"], d["rank"], d["site"], d["kind"], d["verdict"], d["mended"]) for d in found] == [
        (2, 0, "attention.scores", "inf", "transient", True),
        (3, 1, "gradient", "norm_spike", "transient", False),
        (5, 1, "process", "exit", "transient", False),
    ]
    assert {"micro_step", "device", "layer", "residual_ratio", "detected_at"} <= found[0].keys()
    assert json.loads(command("detections", "--json", "--limit", "1")[1]) == found[-1:]


@pytest.mark.usefixtures("ended")
def test_decisions_and_their_explanation(command: Command) -> None:
    decisions = json.loads(command("decisions", "--json")[1])
    assert [(d["decision_id"], d["action"], d["outcome"]) for d in decisions] == [
        ("g1-s2-a0", "corrected", "succeeded"),
        ("g1-s3-a0", "replay", "succeeded"),
        ("g1-s3-a1", "continue", "succeeded"),
        ("g1-exit", "restart", "succeeded"),
    ]
    assert decisions[2]["verdicts"] == {decisions[1]["evidence"][0]: "transient"}
    explained = json.loads(command("explain", "g1-s3-a0", "--json")[1])
    assert explained["rule"] == "replay"
    assert explained["decision"]["action"] == "replay"
    assert explained["detections"][0]["site"] == "gradient"
    code, out, _ = command("explain", "g1-s3-a0")
    assert code == 0
    assert "ruled out" in out


@pytest.mark.usefixtures("ended")
def test_a_decision_that_there_is_not(command: Command) -> None:
    code, out, err = command("explain", "g9-s9-a9")
    assert (code, out) == (1, "")
    assert err.splitlines()[-1].startswith("resilience: g9-s9-a9: no such decision")


@pytest.mark.usefixtures("ended")
def test_events_are_a_line_each_and_end(command: Command) -> None:
    code, out, _ = command("events", "--follow", "--json")
    events = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [event["sequence"] for event in events] == sorted(event["sequence"] for event in events)
    assert {"generation", "decision", "exit", "checkpoint"} <= {event["kind"] for event in events}
    later = command("events", "--after", str(events[-2]["sequence"]), "--json")[1]
    assert [json.loads(line) for line in later.splitlines()] == events[-1:]


@pytest.mark.usefixtures("ended")
def test_checkpoints_as_reported(command: Command) -> None:
    (fact,) = json.loads(command("checkpoints", "list", "--json")[1])
    assert (fact["kind"], fact["tag"], fact["step"], fact["last_verified_step"]) == ("published", "global_step4", 4, 4)


@pytest.mark.usefixtures("ended")
def test_a_device_can_be_put_back_after_the_run_has_ended(command: Command) -> None:
    assert command("cordon", "device-1", "--reason", "noisy")[1] == "cordoned: device-1\n"
    assert command("cordon", "device-1")[1] == "device-1 was cordoned already\n"
    devices = {device["device"]: device for device in json.loads(command("devices", "--json")[1])}
    assert (devices["device-1"]["cordoned"], devices["device-1"]["reason"]) == (True, "noisy")
    assert devices["device-0"]["cordoned"] is False
    assert json.loads(command("uncordon", "device-1", "--json")[1]) == {"cordoned": False, "devices": ["device-1"]}
    code, _, err = command("cordon", "device-7")
    assert code == 1
    assert "no such device or node" in err


@pytest.mark.usefixtures("ended")
def test_a_run_that_has_ended_cannot_be_drained(command: Command) -> None:
    code, _, err = command("drain")
    assert code == 1
    assert "nothing to drain" in err


@pytest.mark.usefixtures("ended")
def test_a_run_that_has_ended_has_no_snapshots_and_takes_none(command: Command) -> None:
    assert json.loads(command("snapshots", "--json")[1]) == []
    assert "no memory snapshot" in command("snapshots")[1]
    for words in (["snapshot", "now"], ["rewind"], ["rewind", "--step", "3"]):
        code, _, err = command(*words)
        assert code == 1
        assert "the run has ended" in err


def test_another_run_directory(command: Command, ended: FakeRun, here: Path) -> None:
    del ended
    (here / "resilience-runs" / "latest").unlink()
    assert command("status")[0] == 64
    assert command("status", "--run-dir", "resilience-runs/20260101-000000-1")[0] == 0


def test_a_run_without_a_journal_is_unreachable(command: Command, ended: FakeRun, here: Path) -> None:
    del ended
    (here / "resilience-runs" / "latest" / "journal.db").unlink()
    code, _, err = command("status")
    assert code == 69
    assert "does not answer and left no journal" in err
