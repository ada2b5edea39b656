"""Which snapshot all ranks go back to, and what is said where there is none."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilience.guard.rewind import NEWEST, Offer, choose


def offer(*steps: int, problem: str = "", clean_step: int | None = None, clean_through: int = 100) -> Offer:
    return Offer(steps=steps, problem=problem, clean_step=clean_step, clean_through=clean_through)


@pytest.mark.parametrize(
    ("offers", "order", "step"),
    [
        ([offer(4, 5, 6), offer(3, 4, 5)], 0, 5),
        ([offer(4, 5, clean_step=4), offer(4, 5)], 0, 4),
        ([offer(4, 5, clean_step=6), offer(4, 5, clean_step=4)], 0, 4),
        # What the run finds by itself is known to be from before; an operator knows nothing but that it is odd.
        ([offer(4, 5, clean_through=4), offer(4, 5, clean_through=5)], 0, 5),
        ([offer(4, 5, clean_through=4), offer(4, 5, clean_through=5)], NEWEST, 4),
        ([offer(4, 5), offer(4, 5)], 1 + 4, 4),
        ([offer(0), offer(0)], 1 + 0, 0),
    ],
)
def test_the_newest_that_serves_all_ranks(offers: list[Offer], order: int, step: int) -> None:
    assert choose(offers, order) == (step, "")


@pytest.mark.parametrize(
    ("offers", "order", "words"),
    [
        ([offer(4, clean_step=-1), offer(4)], 0, "not known since when"),
        ([offer(), offer(4)], 0, "no memory snapshot is whole on all ranks"),
        ([offer(4), offer(5)], 0, "no memory snapshot is whole on all ranks"),
        ([offer(4, clean_step=3), offer(4)], 0, "the oldest of step 4, are newer than step 3"),
        # An operator is told what can be done.
        (
            [offer(4, 5, clean_through=3), offer(4, 5, clean_through=2)],
            NEWEST,
            "newer than step 2, the last that is known to be clean; to take one unproven, name it"
            " (`resilience rewind --step 5`; there are 4, 5), or wait: with detection.at_rest_share = 1",
        ),
        ([offer(4), offer(problem="the history begins later")], 0, "rank 1: the history begins later"),
        ([offer(problem="none is kept"), offer(problem="none is kept")], 0, "none is kept"),
        (
            [offer(4, 5), offer(4, 5)],
            1 + 3,
            "only the memory snapshots of step 4, 5 can be gone back to, not that of 3",
        ),
    ],
)
def test_why_there_is_none(offers: list[Offer], order: int, words: str) -> None:
    step, reason = choose(offers, order)
    assert step is None
    assert words in reason


def test_no_step_is_named_that_holds_what_is_wrong() -> None:
    _, reason = choose([offer(4, 5, clean_through=3, clean_step=3), offer(4, 5, clean_through=3)], NEWEST)
    assert "--step" not in reason


offers_of_ranks = st.lists(
    st.builds(
        Offer,
        steps=st.lists(st.integers(0, 9), unique=True).map(sorted).map(tuple),
        problem=st.sampled_from(["", "why"]),
        clean_step=st.none() | st.integers(-1, 9),
        clean_through=st.integers(0, 9),
    ),
    min_size=1,
    max_size=4,
)


@given(offers_of_ranks, st.integers(0, 10))
def test_never_a_snapshot_that_a_rank_lacks_or_doubts(offers: Any, order: int) -> None:
    step, reason = choose(offers, order)
    if step is None:
        assert reason
        return
    assert all(step in each.steps for each in offers)
    assert all(each.clean_step is None or step <= each.clean_step for each in offers)
    assert order in (0, NEWEST, 1 + step)
    assert order != NEWEST or all(step <= each.clean_through for each in offers)
