"""The picture of `resilience top`: what is in it at every size, and what goes first when there is no room."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterator

import pytest
from rich.console import Console

from resilience.cli.frame import Glance, draw, full_height
from resilience.cli.look import Looker
from resilience.coordinator import queries
from resilience.errors import CoordinatorUnreachableError
from resilience.events import Check, DetectionKind, SnapshotFact, SnapshotKind
from resilience.rpc.v1 import operator_pb2 as op
from resilience.testing import FakeClock, FakeRun


class FakeSource:
    """Answers from a run in memory, unless it is silent."""

    def __init__(self, run: FakeRun, *, is_live: bool = True) -> None:
        self.fake = run
        self.is_live = is_live
        self.silent = False
        self.closed = False

    def close(self) -> None:
        self.closed = True

    def _now(self) -> float:
        if self.silent:
            raise CoordinatorUnreachableError("nobody answers")
        return self.fake.clock.wall()

    def run(self) -> op.Run:
        return queries.get_run(self.fake.machine, now=self._now())

    def ranks(self) -> op.ListRanksResponse:
        return queries.list_ranks(self.fake.machine, now=self._now())

    def decisions(self, *, limit: int) -> op.ListDecisionsResponse:
        return queries.list_decisions(self.fake.state, limit=limit)

    def snapshots(self) -> op.ListSnapshotsResponse:
        return queries.list_snapshots(self.fake.machine)

    def events(self, *, after: int, follow: bool) -> Iterator[op.Event]:
        assert not follow, "a stream from a coordinator whose host is gone never ends"
        yield from queries.events_after(self.fake.state, after)


@pytest.fixture
def run() -> FakeRun:
    """Two nodes of four devices, a fault mended and one replayed."""
    run = FakeRun(num_nodes=2, num_devices=4)
    run.start()
    run.script.at(step=2).alarms(site="attention.scores", kind=DetectionKind.INF, mended=True, bit_exact=True)
    run.script.at(step=3, rank=1).alarms(site="gradient", check=Check.NORM, kind=DetectionKind.NORM_SPIKE)
    run.train(until=6)
    return run


def looker(source: FakeSource, reopened: FakeSource | None = None) -> Looker:
    def reopen() -> FakeSource:
        if reopened is None:
            raise CoordinatorUnreachableError("nobody else")
        return reopened

    return Looker(source, reopen, FakeClock())  # type: ignore[arg-type]  # what is not asked for is not there


def drawn(glance: Glance, width: int, height: int) -> list[str]:
    out = io.StringIO()
    console = Console(file=out, width=width, height=height, color_system=None, legacy_windows=False)
    console.print(draw(glance, width, height, footer="q quits"), height=height)
    return [line.rstrip() for line in out.getvalue().splitlines()]


@pytest.mark.parametrize("width", [8, 20, 40, 60, 80, 100, 200])
@pytest.mark.parametrize("height", [1, 2, 3, 5, 8, 12, 24, 60])
def test_every_size_is_filled_and_never_more(run: FakeRun, width: int, height: int) -> None:
    lines = drawn(looker(FakeSource(run)).look(), width, height)
    assert len(lines) == height
    assert max(len(line) for line in lines) <= width
    assert lines[0].startswith("run")
    if height > 2:
        assert lines[-1].startswith("q quits"[:width])
    assert not any("╭" in line for line in lines), "a section without content"


def test_the_whole_picture_leaves_nothing_out(run: FakeRun) -> None:
    glance = looker(FakeSource(run)).look()
    text = "\n".join(drawn(glance, 400, full_height(glance, 400) + 1))
    assert all(f"device-{rank}" in text for rank in range(8))
    assert all(decision.decision_id in text and decision.reason in text for decision in glance.decisions)
    assert all(event.text in text for event in glance.events)
    assert len(glance.decisions) == 3


def test_of_many_ranks_the_unusual_ones_are_shown(run: FakeRun) -> None:
    glance = looker(FakeSource(run)).look()
    ranks = [op.RankState(rank=rank, node="a", device=f"d{rank}", state="training", step=9) for rank in range(500)]
    ranks[321].state = "lost"
    ranks[77].step = 8
    lines = drawn(dataclasses.replace(glance, ranks=ranks), 100, 16)
    shown = [line.split()[0] for line in lines if " training " in line or " lost " in line][1:]
    assert {"77", "321"} <= set(shown)
    assert shown == sorted(shown, key=int)
    assert any(f"ranks, {len(shown)} of 500" in line for line in lines)


def test_age_of_the_newest_whole_snapshot(run: FakeRun) -> None:
    kept = SnapshotFact(kind=SnapshotKind.TAKEN, step=5, generation=1, node="a", num_bytes=1 << 20, at=run.clock.wall())
    run.report("rank:0", snapshots=(kept,))
    run.clock.advance(3.0)
    head = " ".join(drawn(looker(FakeSource(run)).look(), 200, 24)[:3])
    assert "snapshot of step 5 in memory, 1 step and 3.0 s old" in head


def test_rates_are_measured_between_looks_and_afresh_after_a_restart(run: FakeRun) -> None:
    source = FakeSource(run)
    watching = looker(source)
    assert watching.look().steps_per_s == {}
    run.train(until=16)  # a step a second
    measured = watching.look().steps_per_s
    assert set(measured) == set(range(8))
    assert all(rate == pytest.approx(1.0, rel=0.05) for rate in measured.values())
    assert "1.00 steps/s" in " ".join(drawn(watching.look(), 200, 24)[:3])
    run.restart(from_step=16, exits=[run.exit_of(1, -9)])
    assert watching.look().steps_per_s == {}, "another generation"


def test_a_silent_coordinator_leaves_its_last_picture_and_is_asked_on(run: FakeRun) -> None:
    source = FakeSource(run)
    watching = looker(source)
    before = watching.look()
    source.silent = True
    glance = watching.look()
    assert glance.run == before.run
    assert "has been silent for" in drawn(glance, 80, 24)[0]
    source.silent = False
    assert "silent" not in drawn(watching.look(), 80, 24)[0]


def test_the_journal_answers_once_it_tells_the_end(run: FakeRun) -> None:
    source, journal = FakeSource(run), FakeSource(run, is_live=False)
    watching = looker(source, journal)
    watching.look()
    source.silent = True
    assert watching.look().is_live, "the run has not ended: a coordinator may come back"
    from resilience.coordinator.machine import commands as c

    run.submit(c.Close(reason="the test is over"))
    glance = watching.look()
    assert (glance.is_live, source.closed) == (False, True)
    assert "the coordinator has ended" in drawn(glance, 80, 24)[0]


def test_nobody_answered_yet(run: FakeRun) -> None:
    source = FakeSource(run)
    source.silent = True
    with pytest.raises(CoordinatorUnreachableError):
        looker(source).look()


def test_events_are_asked_for_once(run: FakeRun) -> None:
    watching = looker(FakeSource(run))
    first = watching.look().events
    run.train(until=8)
    again = watching.look().events
    assert [event.sequence for event in again] == sorted({event.sequence for event in again})
    assert again[: len(first)] == first
