"""The rotation covers every byte in turn; votes and covers are what they say."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilience.guard.at_rest_schedule import GRAIN_BYTES, Supply, cover, odd_ones_out, period, pieces

SIZES = st.lists(st.integers(0, 5000), max_size=12)
SHARES = st.floats(0.01, 1.0)


@given(SIZES, SHARES, st.integers(0, 10**9))
def test_every_byte_has_its_turn_once_within_a_period(sizes: list[int], share: float, first_step: int) -> None:
    turns = [pieces(sizes, share, step) for step in range(first_step, first_step + period(share))]
    seen = sorted(piece for turn in turns for piece in turn)
    for tensor, size in enumerate(sizes):
        edges = [(piece.start, piece.stop) for piece in seen if piece.tensor == tensor]
        assert [start for start, _ in edges] == [0, *(stop for _, stop in edges)][: len(edges)]
        assert (edges[-1][1] if edges else 0) == size
        assert all(start < stop and start % GRAIN_BYTES == 0 for start, stop in edges)


@given(SIZES, SHARES, st.integers(0, 10**6))
def test_a_turn_is_no_larger_than_its_share(sizes: list[int], share: float, step: int) -> None:
    num_bytes = sum(piece.stop - piece.start for piece in pieces(sizes, share, step))
    assert num_bytes <= sum(sizes) / period(share) + 2 * GRAIN_BYTES + 1


def test_large_tensors_are_cut() -> None:
    found = pieces([10 << 20], 1.0, 3)
    assert [piece.stop - piece.start for piece in found] == [4 << 20, 4 << 20, 2 << 20]


@pytest.mark.parametrize(("share", "steps"), [(0.0, 0), (1.0, 1), (0.5, 2), (0.0625, 16), (0.3, 4), (0.1, 10)])
def test_the_period_is_the_bound_that_the_documentation_states(share: float, steps: int) -> None:
    assert period(share) == steps


def test_nothing_is_hashed_where_the_share_is_zero() -> None:
    assert pieces([100, 100], 0.0, 5) == []


@given(st.lists(st.sampled_from([1, 2, 3, None]), max_size=9))
def test_the_odd_ones_are_those_that_a_majority_disagrees_with(values: list[int | None]) -> None:
    held = [value for value in values if value is not None]
    leader = next((value for value in held if 2 * held.count(value) > len(held)), None)
    expected = tuple(rank for rank, value in enumerate(values) if leader is not None and value not in (leader, None))
    assert odd_ones_out(values) == expected


def test_two_that_disagree_blame_nobody() -> None:
    assert odd_ones_out([7, 8]) == ()
    assert odd_ones_out([7, 8, 7]) == (1,)


SUPPLIES = st.builds(
    lambda rank, start, length, priority: Supply(rank, start, start + length, priority),
    st.integers(0, 3),
    st.integers(0, 30),
    st.integers(0, 20),
    st.integers(0, 1),
)


@given(st.integers(0, 20), st.integers(0, 30), st.lists(SUPPLIES, max_size=8))
def test_a_cover_has_each_element_once_from_somebody_who_has_it(
    start: int, length: int, supplies: list[Supply]
) -> None:
    wanted = list(range(start, start + length))
    plan = cover(start, start + length, supplies)
    offered = {element for supply in supplies for element in range(supply.start, supply.stop)}
    assert (plan is not None) == (set(wanted) <= offered)
    if plan is None:
        return
    assert [element for part in plan for element in range(part.start, part.stop)] == wanted
    for part in plan:
        first = {(s.rank, s.priority) for s in supplies if s.start <= part.start and part.stop <= s.stop}
        assert (part.rank, part.priority) in first
        best = min(s.priority for s in supplies if s.start <= part.start < s.stop)
        assert part.priority == best
