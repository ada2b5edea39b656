"""`resilience report` on runs that left a journal, only report.json, something damaged, or nothing."""

from __future__ import annotations

import json
import shutil
import sqlite3
from pathlib import Path

import pytest

from resilience.cli.recorded import RecordedSource
from resilience.coordinator.report import write_report
from resilience.report_page import draw_page, from_coordinator, from_directory
from resilience.testing import FakeRun

from .conftest import Command

LATEST = Path("resilience-runs") / "latest"
RUN = "20260101-000000-1"


@pytest.mark.usefixtures("ended")
@pytest.mark.parametrize("words", [[], [RUN], [f"resilience-runs/{RUN}"], ["--run-dir", f"resilience-runs/{RUN}"]])
def test_the_page_of_a_run_that_has_ended(command: Command, here: Path, words: list[str]) -> None:
    code, out, _ = command("report", *words, "--html", "run.html")
    assert code == 0
    assert out.startswith("run.html: ")
    page = (here / "run.html").read_text(encoding="utf-8")
    assert "3 alarms, 1 mended in place." in page
    assert "1 iteration replayed and 1 restart" in page
    assert page.count('class="decision ') == 4
    assert "device-1" in page
    assert 'class="stroke sticks' in page
    assert "report.json alone" not in page


@pytest.mark.usefixtures("ended")
def test_what_a_coordinator_tells_is_enough_for_a_page(here: Path) -> None:
    material = from_coordinator(RecordedSource(here / LATEST / "journal.db"))
    assert material.report.keys() == from_directory(here / LATEST).report.keys()
    page = draw_page(material)
    assert "3 alarms, 1 mended in place." in page
    assert page.count('class="decision ') == 4
    assert page.count('class="band training"') == 2
    assert "all else, by causes that are not told here" in page
    assert "Drawn from what the coordinator tells" in page


def test_the_json_is_what_report_json_would_hold_now(command: Command, ended: FakeRun) -> None:
    code, out, _ = command("report", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["run_id"] == ended.run_id
    assert [d["action"] for d in found["decisions"]] == ["corrected", "replay", "continue", "restart"]
    assert found["outcome"] == "interrupted"


def test_a_run_that_was_broken_off(command: Command, ended: FakeRun, here: Path) -> None:
    """Its coordinator died: the journal has no last word."""
    del ended
    with sqlite3.connect(here / LATEST / "journal.db") as journal:
        assert journal.execute("DELETE FROM facts WHERE kind = 'Finished'").rowcount == 1
    journal.close()
    assert command("report", "--html", "run.html")[0] == 0
    assert "Ended without a word" in (here / "run.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("left", ["nothing", "garbage", "a newer version", "a fact of a newer version"])
def test_without_a_journal_that_can_be_read_report_json_serves(
    command: Command, ended: FakeRun, here: Path, left: str
) -> None:
    write_report(ended.state, here / LATEST / "report.json", now=ended.clock.wall())
    _damage(here / LATEST / "journal.db", left)
    code, _, err = command("report", "--html", "run.html")
    assert (code, err) == (0, "")
    page = (here / "run.html").read_text(encoding="utf-8")
    assert "Drawn from report.json alone" in page
    assert page.count('class="decision ') == 4


@pytest.mark.parametrize("left", ["garbage", "a newer version", "a fact of a newer version"])
def test_a_damaged_journal_alone_is_told(command: Command, ended: FakeRun, here: Path, left: str) -> None:
    del ended
    _damage(here / LATEST / "journal.db", left)
    code, out, err = command("report", "--html", "run.html")
    assert (code, out, len(err.splitlines())) == (1, "", 1)
    assert "journal.db" in err
    assert not (here / "run.html").exists()


def _damage(journal: Path, how: str) -> None:
    if how == "nothing":
        journal.unlink()
    elif how == "garbage":
        journal.write_bytes(b"no database at all" * 100)
    else:
        statement = "UPDATE meta SET value = '99'" if how == "a newer version" else "UPDATE facts SET kind = 'Dreamt'"
        with sqlite3.connect(journal) as connection:
            connection.execute(statement)
        connection.close()


@pytest.mark.usefixtures("ended")
@pytest.mark.parametrize("content", ["", "{", "[]", "\x00"])
def test_a_damaged_report_alone_is_told(command: Command, here: Path, content: str) -> None:
    (here / LATEST / "journal.db").unlink()
    (here / LATEST / "report.json").write_text(content)
    code, out, err = command("report", "--html", "run.html")
    assert (code, out, len(err.splitlines())) == (1, "", 1)
    assert "report.json" in err


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--html", "x.html"], 0, ""),
        ([], 64, "nothing to write: give --html FILE"),
        (["no-such-run", "--html", "x.html"], 64, "no-such-run: no run there"),
        (["empty", "--html", "x.html"], 64, "empty: no run there (neither"),
        ([RUN, "--run-dir", "empty", "--html", "x.html"], 64, "two runs are named"),
        (["--html", "nowhere/x.html"], 64, "nowhere/x.html: cannot be written"),
        (["--html", "/dev/null"], 64, "/dev/null: is a device or a pipe"),
        (["--html", "empty"], 64, "--html"),
        (["--html", "x.html", "--address", "127.0.0.1:9"], 69, "does not answer"),
    ],
)
@pytest.mark.usefixtures("ended")
def test_bad_input_gets_one_clear_line(command: Command, here: Path, words: list[str], code: int, said: str) -> None:
    (here / "empty").mkdir()
    found, out, err = command("report", *words)
    assert found == code
    assert said in err
    if code:
        assert (out, len(err.splitlines())) == ("", 1)
        assert not list(here.glob("*.html"))


def test_a_dead_coordinator_that_left_nothing_is_unreachable(command: Command, ended: FakeRun, here: Path) -> None:
    del ended
    (here / LATEST / "journal.db").unlink()
    code, out, err = command("report", "--html", "run.html")
    assert (code, out, len(err.splitlines())) == (69, "", 1)
    assert "does not answer and left neither journal.db nor report.json" in err


def test_the_page_is_written_whole_or_not_at_all(command: Command, ended: FakeRun, here: Path) -> None:
    del ended
    (here / "run.html").write_text("an older page")
    shutil.rmtree(here / "resilience-runs" / RUN)
    assert command("report", "--html", "run.html")[0] == 64
    assert (here / "run.html").read_text() == "an older page"
    assert [path.name for path in here.iterdir() if path.name.startswith(".")] == []
