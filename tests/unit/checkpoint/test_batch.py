"""The samples of an optimizer step are kept or refused, never changed."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilience.checkpoint.batch import Batch, parse, possible_world_sizes, rescale
from resilience.errors import CheckpointError

BATCHES = st.builds(
    lambda micro, accumulation, ranks: Batch(
        train_batch_size=micro * accumulation * ranks,
        micro_batch_size=micro,
        accumulation=accumulation,
        world_size=ranks,
    ),
    st.integers(1, 16),
    st.integers(1, 16),
    st.integers(1, 32),
)
EIGHT = Batch(train_batch_size=8, micro_batch_size=2, accumulation=2, world_size=2)


@given(BATCHES, st.integers(1, 64))
def test_a_step_takes_as_many_samples_or_the_ranks_are_refused(before: Batch, ranks: int) -> None:
    possible = possible_world_sizes(before.train_batch_size, before.micro_batch_size)
    if ranks in possible:
        after = rescale(before, ranks)
        assert (after.train_batch_size, after.micro_batch_size) == (before.train_batch_size, before.micro_batch_size)
        assert after.world_size == ranks
    else:
        with pytest.raises(CheckpointError) as refused:
            rescale(before, ranks)
        assert str(ranks) in str(refused.value)
        assert "\n" not in str(refused.value)


@given(BATCHES, st.integers(1, 64))
def test_there_and_back_is_where_it_was(before: Batch, ranks: int) -> None:
    if ranks in possible_world_sizes(before.train_batch_size, before.micro_batch_size):
        assert rescale(rescale(before, ranks), before.world_size) == before


@given(BATCHES)
def test_what_is_possible_is_complete(before: Batch) -> None:
    samples = before.train_batch_size // before.micro_batch_size
    assert possible_world_sizes(before.train_batch_size, before.micro_batch_size) == tuple(
        ranks for ranks in range(1, samples + 1) if samples % ranks == 0
    )


def test_the_refusal_names_the_values_and_what_would_do() -> None:
    with pytest.raises(CheckpointError) as refused:
        rescale(EIGHT, 8)
    assert str(refused.value) == (
        "8 ranks with micro-batch 2 cannot keep train_batch_size 8: with micro-batch 2 use 1, 2 or 4 ranks, "
        "or for 8 ranks set train_micro_batch_size_per_gpu to 1"
    )
    with pytest.raises(CheckpointError, match="choose another train_batch_size"):
        rescale(EIGHT, 3, micro_batch_size=3)


def test_the_micro_batch_of_this_run_counts() -> None:
    assert rescale(EIGHT, 4, micro_batch_size=1).accumulation == 2


def test_numbers_that_do_not_fit_make_no_batch() -> None:
    for wrong in ({"train_batch_size": 9}, {"accumulation": 0}):
        with pytest.raises(ValueError, match=r"product|below 1"):
            dataclasses.replace(EIGHT, **wrong)


@given(BATCHES)
def test_what_was_recorded_is_read_back(batch: Batch) -> None:
    assert parse(dataclasses.asdict(batch)) == batch


def test_nonsense_is_nothing() -> None:
    recorded = dataclasses.asdict(EIGHT)
    for nonsense in (None, {}, {**recorded, "world_size": None}, {**recorded, "world_size": 3}, [1]):
        assert parse(nonsense) is None  # type: ignore[arg-type]
