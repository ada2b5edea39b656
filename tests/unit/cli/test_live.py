"""top and watch where there is no terminal, and on a run that has ended."""

from __future__ import annotations

import json
import re
import sqlite3
from pathlib import Path

import pytest

from resilience.testing import FakeRun

from .conftest import Command

pytestmark = pytest.mark.usefixtures("ended")


def test_top_refuses_where_there_is_no_terminal_before_it_asks_anybody(command: Command) -> None:
    code, out, err = command("top")
    assert (code, out) == (64, "")
    assert err == "resilience: top draws on a terminal, and this is none: give --once for one picture, or use watch\n"


def test_top_once_prints_one_whole_picture(command: Command) -> None:
    code, out, err = command("top", "--once")
    assert code == 0
    assert "answering read-only from" in err
    lines = out.splitlines()
    assert lines[0].startswith("the coordinator has ended")
    assert "run · failed, exit code 75" in lines[1]
    assert max(len(line) for line in lines) <= 80
    assert [line.split()[0] for line in lines if re.search(r" device-\d", line)] == ["0", "1"]
    assert "\x1b" not in out
    told = json.loads(command("top", "--json")[1])
    assert (told["is_live"], len(told["ranks"]), told["run"]["state"]) == (False, 2, "failed")


def test_watch_tells_the_newest_events_of_a_run_that_has_ended_and_ends_as_it_did(command: Command) -> None:
    code, out, _ = command("watch", "--lines", "3", "--json")
    events = [json.loads(line) for line in out.splitlines()]
    assert code == 75
    assert len(events) == 3
    assert events[-1]["kind"] == "finished"
    assert len(command("watch", "--lines", "0")[1].splitlines()) > 10


def test_watch_of_a_run_whose_end_nobody_knows(command: Command, ended: FakeRun, here: Path) -> None:
    """A journal that stops in the middle: the coordinator's host was lost."""
    del ended
    path = here / "resilience-runs" / "latest" / "journal.db"
    with sqlite3.connect(path) as database:
        gone = database.execute("DELETE FROM facts WHERE kind = 'Finished'").rowcount
    database.close()
    assert gone == 1
    code, _, err = command("watch")
    assert code == 69
    assert "its journal does not tell how the run ended" in err.splitlines()[-1]
