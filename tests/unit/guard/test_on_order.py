"""An operator's order for a snapshot is answered: once, soon, and with what is so on all ranks."""

from __future__ import annotations

import dataclasses

import pytest

from resilience.events import OrderAnswer
from resilience.guard.notes import Flags
from resilience.guard.on_order import SnapshotOrder
from resilience.guard.reporter import Orders, SilentReporter
from resilience.testing import FakeClock

NOTHING = Flags(*[0] * len(dataclasses.fields(Flags)))


class Ordered(SilentReporter):
    """The line to a coordinator that has given orders."""

    def __init__(self) -> None:
        self.answers: list[tuple[str, int, str]] = []
        super().__init__(on_fact=self._note)
        self.order = ""

    def _note(self, fact: object) -> None:
        assert isinstance(fact, OrderAnswer)
        self.answers.append((fact.directive_id, fact.step, fact.problem))

    def orders(self) -> Orders:
        return Orders(snapshot=self.order)

    def order_done(self, name: str) -> None:
        assert name == "take_snapshot"
        self.order = ""


class Boundaries:
    """Rank 0 at one boundary after the other."""

    def __init__(self) -> None:
        self.line, self.clock, self.step = Ordered(), FakeClock(), 0
        self.follow = SnapshotOrder(self.line, self.clock)

    def next(self, *, seconds: float = 1.0, problem: str = "", **flags: int) -> list[tuple[str, int, str]]:
        self.step += 1
        self.clock.advance(seconds)
        reduced = dataclasses.replace(NOTHING, **{"snapshot": int(bool(self.line.order)), **flags})
        self.follow.at_boundary(reduced, step=self.step, problem=problem)
        return self.line.answers


@pytest.fixture
def ranks() -> Boundaries:
    return Boundaries()


def test_it_is_answered_when_all_ranks_have_it(ranks: Boundaries) -> None:
    assert ranks.next() == []
    ranks.line.order = "snapshot-1"
    assert ranks.next() == [], "it is taken after this step"
    assert ranks.line.order == "", "not twice"
    assert ranks.next() == [("snapshot-1", 2, "")]
    assert len(ranks.next()) == 1


def test_one_that_a_rank_lost_was_not_taken(ranks: Boundaries) -> None:
    ranks.line.order = "snapshot-1"
    ranks.next()
    ((_, step, problem),) = ranks.next(lost_snapshot=1)
    assert (step, problem) == (0, "the state was changed while a rank copied it; ask again")


def test_one_for_which_there_was_no_room_was_not_taken(ranks: Boundaries) -> None:
    ranks.line.order = "snapshot-1"
    ranks.next()
    ((_, step, problem),) = ranks.next(snapshots_off=1, no_snapshot=1)
    assert step == 0
    assert "another rank takes none" in problem


def test_where_none_are_taken_that_is_said_at_once(ranks: Boundaries) -> None:
    ranks.line.order = "snapshot-1"
    assert ranks.next(snapshots_off=1, no_snapshot=1, problem="memory snapshots are off") == [
        ("snapshot-1", 0, "memory snapshots are off")
    ]
    assert ranks.line.order == ""


def test_it_waits_for_a_slot_but_not_for_ever(ranks: Boundaries) -> None:
    ranks.line.order = "snapshot-1"
    for _ in range(19):
        assert ranks.next(no_snapshot=1) == []
    ranks.next()
    assert ranks.next() == [("snapshot-1", 20, "")], "one became free in time"
    ranks.line.order = "snapshot-2"
    for _ in range(20):
        assert len(ranks.next(no_snapshot=1)) == 1
    name, step, problem = ranks.next(no_snapshot=1)[-1]
    assert (name, step) == ("snapshot-2", 0)
    assert "snapshot.slots" in problem
    assert ranks.line.order == ""


def test_an_order_that_comes_after_the_ranks_compared_waits_for_the_next_boundary(ranks: Boundaries) -> None:
    ranks.line.order = "snapshot-1"
    assert ranks.next(snapshot=0) == []
    assert ranks.line.order == "snapshot-1"
    ranks.next()
    assert ranks.next() == [("snapshot-1", 2, "")]
