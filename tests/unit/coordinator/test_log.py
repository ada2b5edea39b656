"""The log: one line per event, in both forms; decisions in a field of their own; nothing twice; never the end of it."""

from __future__ import annotations

import collections
import io
import json
import re

import pytest

from resilience.coordinator.log import Format, Log
from resilience.coordinator.machine import commands as c
from resilience.coordinator.machine.facts import RanksDone
from resilience.testing import FakeRun
from tests.unit.coordinator.observed import ObservedRun


def logged(run: ObservedRun, form: Format) -> io.StringIO:
    """Where the log of `run` goes from now on."""
    out = io.StringIO()
    log = Log(out, form=form, run_id=run.run_id)
    log.go_on(run.state, after=0)
    run.observers = [log]
    return out


def test_each_event_is_one_line_of_json_that_names_what_it_speaks_of() -> None:
    run = ObservedRun()
    out = logged(run, "json")
    run.hurt_and_restarted()
    lines = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [line["message"] for line in lines] == [line.text for line in run.state.story]
    assert all({"time", "level", "event", "run", "message"} <= line.keys() for line in lines)
    assert lines[0]["time"] == "1970-01-12T13:46:40.000Z"
    for line in lines:
        for named in re.findall(r"g\d+-(?:s\d+-a\d+|exit)", line["message"]):
            assert line["decision_id"] == named, line
    alarm, _ = (line for line in lines if line["event"] == "detection")
    assert (alarm["level"], alarm["rank"], alarm["step"], alarm["generation"]) == ("warning", 1, 2, 1)
    assert alarm["detection_id"] in alarm["message"]
    (exit_,) = (line for line in lines if line["event"] == "exit")
    assert (exit_["rank"], exit_["node"], exit_["exit_code"], exit_["level"]) == (1, "a", -9, "warning")
    began = [line for line in lines if line["event"] == "generation"]
    assert [line.get("decision_id") for line in began] == [None, "g1-exit"], "the second one because of a decision"
    decided = [line for line in lines if line["event"] == "decision"]
    names = collections.Counter(line["decision_id"] for line in decided)
    assert names == {"g1-s2-a0": 2, "g1-s2-a1": 2, "g1-exit": 2}, "made and executed"
    assert decided[-1]["outcome"] == "succeeded"


def test_for_people_a_line_begins_with_when_and_ends_with_what() -> None:
    run = ObservedRun()
    out = logged(run, "text")
    run.hurt_and_restarted()
    lines = out.getvalue().splitlines()
    assert len(lines) == run.state.num_lines
    alarm, _ = (line for line in lines if " detection: " in line)
    assert re.match(
        r"^1970-01-12T13:46:41\.000Z WARNING detection: \S+: mismatch in .* \| run=run generation=1 step=2 ", alarm
    )
    assert "device=" in alarm
    (died,) = (line for line in lines if " exit: " in line)
    assert died.endswith("exit_code=-9")


def test_how_the_run_ends_decides_the_level() -> None:
    for code, level in ((0, "info"), (75, "error")):
        run = ObservedRun()
        out = logged(run, "json")
        run.start()
        run.submit(c.Leave(run_id=run.run_id, generation=0, member="launcher", exit_code=code, reason="asked\nfor"))
        last = json.loads(out.getvalue().splitlines()[-1])
        assert (last["event"], last["level"], last["exit_code"]) == ("finished", level, code)


def test_a_coordinator_that_came_back_tells_nothing_twice() -> None:
    run = ObservedRun()
    before = logged(run, "text")
    run.start()
    run.train(until=2)
    run.observers = []
    recovered = run.recovered().state.num_lines
    run.restart_coordinator()
    out = io.StringIO()
    log = Log(out, form="text", run_id=run.run_id)
    log.go_on(run.state, after=recovered)
    run.observers = [log]
    run.script.at(step=3, rank=0).alarms(times=1)
    run.train(until=3)
    assert "came back from its journal" in out.getvalue().splitlines()[0]
    told = before.getvalue().splitlines() + out.getvalue().splitlines()
    assert len(told) == len(set(told)) == run.state.num_lines


def test_a_log_that_cannot_be_written_ends_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    run = FakeRun()
    log = Log(Full(), form="json", run_id="run")
    log.go_on(run.state, after=0)
    log.note(RanksDone(), 1.0, run.state)
    assert capsys.readouterr() == ("", "")
