"""Where values lie on an axis, and what is written beside it."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilience.report_page.frames import Event, gather_marks
from resilience.report_page.scales import Scale, log_ticks, number_ticks, share, time_ticks


@pytest.fixture(autouse=True)
def _utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def test_places() -> None:
    scale = Scale(10, 20)
    assert [scale.percent(value) for value in (5, 10, 15, 20, 99)] == [0, 0, 50, 100, 100]
    assert Scale(0.01, 100, is_log=True).percent(1) == pytest.approx(50)
    assert Scale(3, 3).percent(3) == 50


@pytest.mark.parametrize(
    ("low", "high", "count", "expected"),
    [(0, 12, 4, [0, 5, 10]), (0, 1, 4, [0, 0.5, 1]), (2.2, 4.4, 4, [3, 4]), (5, 5, 4, [5])],
)
def test_round_numbers(low: float, high: float, count: int, expected: list[float]) -> None:
    assert number_ticks(low, high, count) == pytest.approx(expected)


def test_powers_of_ten() -> None:
    assert log_ticks(0.005, 200) == pytest.approx([0.01, 0.1, 1, 10, 100])


@pytest.mark.parametrize(
    ("span_s", "first", "num"),
    [(20, "22:13:20", 5), (600, "22:14", 5), (90_000, "15 Nov", 4), (40 * 86400, "16 Nov", 6), (0.5, "+0 s", 6)],
)
def test_round_times(span_s: float, first: str, num: int) -> None:
    ticks = time_ticks(1_700_000_000, 1_700_000_000 + span_s, 7)
    assert ticks[0][1] == first
    assert len(ticks) == num


@given(low=st.floats(0, 4e9), span=st.floats(0.001, 1e9))
def test_times_lie_within_their_axis(low: float, span: float) -> None:
    ticks = time_ticks(low, low + span, 7)
    assert len(ticks) <= 17
    assert all(low - 1e-3 <= at <= low + span + 1e-3 for at, _ in ticks)


def test_shares_are_never_rounded_to_nothing_or_all() -> None:
    assert [share(part, 10_000) for part in (0, 1, 5000, 9999, 10_000)] == [
        "0.0 %",
        "< 0.1 %",
        "50.0 %",
        "> 99.9 %",
        "100.0 %",
    ]


@given(st.lists(st.tuples(st.floats(0, 100), st.sampled_from(["continue", "replay", "stop"])), max_size=60))
def test_marks_stand_for_every_event_and_the_gravest_is_seen(found: list[tuple[float, str]]) -> None:
    marks = gather_marks([Event(at, sign, f"{sign} at {at}") for at, sign in found], Scale(0, 100))
    assert sum(mark.count for mark in marks) == len(found)
    assert ("stop" in {mark.sign for mark in marks}) == ("stop" in {sign for _, sign in found})
