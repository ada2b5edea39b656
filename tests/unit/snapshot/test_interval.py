"""The interval follows what is measured, and never costs more than the budget."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilience.snapshot.interval import Pace, steps_between

HOUR_S = 3600.0
durations = st.floats(1e-3, 1e3)


def pace(fixed: int | None = None, *, budget_ratio: float = 0.05, seconds_between_failures: float = HOUR_S) -> Pace:
    return Pace(fixed, budget_ratio=budget_ratio, seconds_between_failures=seconds_between_failures)


@given(blocked_s=durations, step_s=durations, budget_ratio=st.floats(0.001, 0.5), mtbf_s=st.floats(1.0, 1e7))
def test_within_the_budget_and_no_later_than_young_and_daly_say(
    blocked_s: float, step_s: float, budget_ratio: float, mtbf_s: float
) -> None:
    steps = steps_between(
        blocked_s=blocked_s, step_s=step_s, budget_ratio=budget_ratio, seconds_between_failures=mtbf_s
    )
    assert steps >= 1
    assert blocked_s / (steps * step_s) <= budget_ratio * (1 + 1e-9)
    # One step fewer would break the budget, or be more often than pays.
    fewer_s = (steps - 1) * step_s
    assert fewer_s <= max(math.sqrt(2 * blocked_s * mtbf_s), blocked_s / budget_ratio) * (1 + 1e-9)


def test_young_and_daly_where_the_budget_allows_it() -> None:
    # √(2 · 0.5 s · 3600 s) = 60 s; the budget alone would allow one each 10 s.
    assert steps_between(blocked_s=0.5, step_s=2.0, budget_ratio=0.05, seconds_between_failures=HOUR_S) == 30


def test_the_budget_where_failures_are_many() -> None:
    assert steps_between(blocked_s=0.5, step_s=1.0, budget_ratio=0.05, seconds_between_failures=1.0) == 10


def test_a_fixed_interval_is_kept_whatever_is_measured() -> None:
    fixed = pace(5)
    assert fixed.is_due(3)
    fixed.taken(3, 100.0, is_typical=True)
    fixed.step_took(0.001)
    assert [step for step in range(4, 12) if fixed.is_due(step)] == list(range(8, 12))


def test_nothing_is_known_before_the_first_one_is_taken() -> None:
    measured = pace()
    assert measured.is_due(1)
    measured.step_took(1.0)
    measured.taken(1, 0.5, is_typical=True)
    assert measured.interval == 60
    assert not measured.is_due(60)
    assert measured.is_due(61)


def test_a_snapshot_that_made_room_first_says_nothing_about_the_next_ones() -> None:
    measured = pace()
    measured.step_took(1.0)
    for step in range(1, 5):
        measured.taken(step, 50.0, is_typical=False)
        # Room is made once for each slot: the sooner that is done, the better.
        assert measured.interval == 1
    measured.taken(5, 0.5, is_typical=True)
    assert measured.interval == 60


def test_one_that_makes_room_each_time_costs_what_it_costs() -> None:
    measured = pace()
    measured.step_took(1.0)
    for step in range(1, 30):
        measured.taken(step, 0.5, is_typical=False)
    assert measured.interval == 60


def test_means_follow_a_change() -> None:
    measured = pace()
    measured.step_took(1.0)
    measured.taken(1, 0.5, is_typical=True)
    for step in range(2, 60):
        measured.step_took(4.0)
        measured.taken(step, 0.5, is_typical=True)
    assert measured.interval == pytest.approx(15, abs=1)


def test_after_a_load_the_next_one_is_an_interval_away() -> None:
    fixed = pace(4)
    fixed.starts_at(10)
    assert [fixed.is_due(step) for step in (11, 13, 14)] == [False, False, True]
