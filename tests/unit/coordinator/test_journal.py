"""The journal gives back what was written, whatever became of the process, and refuses what it does not understand."""

from __future__ import annotations

import math
import sqlite3
from pathlib import Path

import pytest

from resilience.config import PolicyConfig
from resilience.coordinator.journal import (
    Journal,
    JournalError,
    decode_fact,
    encode_fact,
    open_recorded,
    replay,
    set_aside,
)
from resilience.coordinator.machine.effects import Record
from resilience.coordinator.machine.facts import FACTS, DecisionMade, DrainAsked, Fact, Opened
from resilience.errors import UsageError
from resilience.events import Mode
from resilience.policy import decide
from resilience.testing import FakeRun, detection, evidence

OPENED = Opened(run_id="run", mode=Mode.ENFORCE, limits=PolicyConfig(), lease_s=15.0, started_at=1.0)


def test_infinities_and_nested_values_come_back() -> None:
    found = evidence(detection(step=1, kind=detection(step=1).kind), step=1)
    fact = DecisionMade(decision=decide(found, PolicyConfig(), now=2.0), evidence=found)
    assert decode_fact("DecisionMade", encode_fact(fact), where="here") == fact
    opened = Opened(run_id="r", mode=Mode.SHADOW, limits=PolicyConfig(max_restarts=9), lease_s=math.inf, started_at=1.5)
    assert decode_fact("Opened", encode_fact(opened), where="here") == opened


def test_a_whole_run_survives_the_disk(tmp_path: Path) -> None:
    run = FakeRun()
    run.start()
    run.script.at(step=2, rank=1).alarms(times=1)
    run.train(until=4)
    run.restart(from_step=0, exits=[run.exit_of(0, -9)])
    run.train(until=3)
    path = tmp_path / "deep" / "journal.db"
    with Journal.open(path) as journal:
        for kind, body, at in run.journal:
            fact: Fact = decode_fact(kind, body, where="here")
            journal.append([Record(fact, at)])
        journal.copy_to(tmp_path / "copy.db")
    assert path.stat().st_mode & 0o777 == 0o600
    for found in (path, tmp_path / "copy.db"):
        recorded = open_recorded(found)
        assert recorded.machine.state == run.state
        assert recorded.last_at == run.journal[-1][2]
    assert not list(tmp_path.glob("copy.db-*")), "the copy is one plain file"
    assert {kind for kind, _, _ in run.journal} < set(FACTS)


def test_records_of_one_command_are_written_all_or_none(tmp_path: Path) -> None:
    with Journal.open(tmp_path / "journal.db") as journal:
        journal.append([Record(OPENED, 1.0)])
        with pytest.raises(ValueError, match="serialize"):
            journal.append([Record(DrainAsked(reason="x"), 2.0), Record(DrainAsked(reason=lambda: 1), 3.0)])  # type: ignore[arg-type]
        assert replay(journal, now=5.0).num_facts == 1


def test_a_disk_that_is_full_is_told_and_nothing_is_kept_half(tmp_path: Path) -> None:
    with Journal.open(tmp_path / "journal.db") as journal:
        journal.append([Record(OPENED, 1.0)])
        journal._connection.execute("PRAGMA max_page_count = 1")
        with pytest.raises(JournalError, match=r"journal\.db cannot be written: database or disk is full"):
            journal.append([Record(DrainAsked(reason="x" * 100_000), 2.0)])
        assert replay(journal, now=5.0).num_facts == 1


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        ("UPDATE meta SET value = '99'", "has schema version 99, this program reads 1"),
        ("DELETE FROM meta", "has schema version none"),
        ("UPDATE facts SET kind = 'Unheard'", "fact 1: kind 'Unheard' is not known"),
        ("UPDATE facts SET body = '{\"run_id\": 3}'", "fact 1: Opened cannot be read"),
        ("UPDATE facts SET body = 'x'", "fact 1: Opened cannot be read"),
        ("DELETE FROM facts", "is empty: its run never began"),
        ("DROP TABLE facts", "no such table"),
    ],
)
def test_a_damaged_journal_is_refused_in_one_line(tmp_path: Path, damage: str, text: str) -> None:
    path = tmp_path / "journal.db"
    with Journal.open(path) as journal:
        journal.append([Record(OPENED, 1.0)])
    connection = sqlite3.connect(path)
    connection.execute(damage)
    connection.commit()
    connection.close()
    with pytest.raises(JournalError, match=text) as error:
        open_recorded(path)
    assert "\n" not in str(error.value)


def test_what_is_no_journal_is_refused(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match="does not exist"):
        open_recorded(tmp_path / "journal.db")
    (tmp_path / "text.db").write_text("this is no database, but it is long enough to look like one" * 20)
    with pytest.raises(JournalError, match="cannot be read: file is not a database"):
        open_recorded(tmp_path / "text.db")
    with pytest.raises(JournalError, match="cannot be opened"):
        Journal.open(tmp_path / "text.db" / "journal.db")


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "r1" / "journal.db"
    with Journal.open(path) as journal:
        journal.append([Record(OPENED, 1.0)])
        with pytest.raises(JournalError, match="being written by another coordinator"):
            Journal.open(path)
        with pytest.raises(UsageError, match=r"launch\.run_id = 'r1': a run of this name is going on"):
            set_aside(path)
        assert open_recorded(path).num_facts == 1, "reading is free"
    with Journal.open(path):
        pass


def test_a_new_run_does_not_go_on_with_the_journal_of_an_earlier_one(tmp_path: Path) -> None:
    path = tmp_path / "r1" / "journal.db"
    set_aside(path)
    for number in range(2):
        with Journal.open(path) as journal:
            assert replay(journal, now=0.0).num_facts == 0
            journal.append([Record(OPENED, float(number))])
        set_aside(path)
    assert [open_recorded(tmp_path / f"r1~{number}" / "journal.db").last_at for number in (1, 2)] == [0.0, 1.0]
