"""Sums over a reduction: silent in every order and dtype of adding, loud on what a broken link or adder does."""

from __future__ import annotations

import functools
import operator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resilience.abft.reduction import CHUNK, ChunkSums, chunk_sums, reduction_ratio

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def parts_of(
    num_ranks: int, size: int, dtype: torch.dtype, *, common: float = 0.0, seed: int = 0
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(size, generator=generator) * common
    return [(torch.randn(size, generator=generator) + shared).to(dtype) for _ in range(num_ranks)]


def first(of_all: ChunkSums) -> ChunkSums:
    return ChunkSums(of_all.sums[0], of_all.energies[0])


def total(every: list[ChunkSums]) -> ChunkSums:
    return ChunkSums(*(torch.stack(parts).sum(0) for parts in zip(*every, strict=True)))


def ratio(parts: list[torch.Tensor], result: torch.Tensor) -> float:
    expected = total([first(chunk_sums(part.view(1, -1))) for part in parts])
    found = first(chunk_sums(result.view(1, -1)))
    return float(reduction_ratio(expected, found, dtype=result.dtype, num_ranks=len(parts)).max())


def added(parts: list[torch.Tensor]) -> torch.Tensor:
    """One after the other, each partial sum rounded: the worst that a ring does."""
    return functools.reduce(operator.add, parts)


@settings(max_examples=60, deadline=None)
@given(
    num_ranks=st.sampled_from([2, 3, 8, 32, 256]),
    size=st.sampled_from([1, 2, 100, CHUNK - 1, CHUNK + 77]),
    dtype=st.sampled_from(DTYPES),
    common=st.sampled_from([0.0, 1.0, 30.0]),
    seed=st.integers(0, 10),
)
def test_clean_reductions_raise_nothing(
    num_ranks: int, size: int, dtype: torch.dtype, common: float, seed: int
) -> None:
    parts = parts_of(num_ranks, size, dtype, common=common, seed=seed)
    assert ratio(parts, added(parts)) <= 0.7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_parts_that_cancel_raise_nothing(dtype: torch.dtype) -> None:
    """Partial sums are largest where the first half of the ranks is taken back by the second."""
    one, *_ = parts_of(1, 1000, dtype)
    parts = [one] * 128 + [-one] * 128
    assert ratio(parts, added(parts)) <= 0.7


@pytest.mark.parametrize("size", [1, 8, 64, 1000])
@pytest.mark.parametrize("common", [0.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_small_reductions_raise_nothing_however_often(size: int, common: float, dtype: torch.dtype) -> None:
    """An estimate of their energy by a few sums was too low once in some ten thousand."""
    num_ranks, num_trials = 8, 2_000_000 // (size + 32)
    parts = parts_of(num_ranks, num_trials * size, dtype, common=common)
    trials = [part.view(num_trials, size) for part in parts]
    expected, found = total([chunk_sums(each) for each in trials]), chunk_sums(added(trials))
    expected, found = (ChunkSums(each.sums[:, 0], each.energies[:, 0]) for each in (expected, found))
    assert float(reduction_ratio(expected, found, dtype=dtype, num_ranks=num_ranks).max()) <= 0.7


@pytest.mark.parametrize(("dtype", "least"), [(torch.float32, 2e-3), (torch.float64, 2e-3), (torch.bfloat16, 30.0)])
def test_one_element_off_is_seen(dtype: torch.dtype, least: float) -> None:
    parts = parts_of(2, 2 * CHUNK + 77, dtype)
    for place in (0, 77, CHUNK - 1, CHUNK, 2 * CHUNK + 76):
        result = added(parts)
        result[place] += least
        assert ratio(parts, result) > 1.0, place


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_links_and_adders_do_wrong_is_seen(dtype: torch.dtype) -> None:
    parts = parts_of(4, 2 * CHUNK, dtype)
    whole = added(parts)
    missing = added(parts[:3])
    twice = added([*parts, parts[0]])
    shifted = whole.roll(1)
    zeroed = whole.clone()
    zeroed[CHUNK : CHUNK + 4096] = 0
    for wrong in (missing, twice, shifted, zeroed) if dtype != torch.bfloat16 else (missing, twice, shifted):
        assert ratio(parts, wrong) > 1.0
    for value in (float("inf"), float("nan"), 0.9 * torch.finfo(dtype).max):
        struck = whole.clone()
        struck[5] = value
        assert not ratio(parts, struck) <= 1.0


@pytest.mark.parametrize("correlation", [0.0, 0.9])
@pytest.mark.parametrize(
    ("dtype", "num_ranks", "is_missing_seen"),
    [
        (torch.float32, 256, (True, True)),
        (torch.float16, 32, (True, True)),
        (torch.bfloat16, 8, (True, True)),
        (torch.bfloat16, 30, (True, False)),
        (torch.bfloat16, 256, (False, False)),
    ],
    ids=str,
)
def test_what_is_seen_among_many_ranks(
    dtype: torch.dtype, num_ranks: int, is_missing_seen: tuple[bool, bool], correlation: float
) -> None:
    """The figures of docs/detection.md: of independent parts, and of parts that have much in common."""
    scale = (1.0 - correlation**2) ** 0.5
    parts = parts_of(num_ranks, 2 * CHUNK, dtype, common=correlation / scale)
    whole = added(parts)
    assert ratio(parts, torch.zeros_like(whole)) > 1.0
    assert ratio(parts, parts[0]) > 1.0
    assert ratio(parts, whole.roll(1)) > 1.0
    seen = [ratio(parts, added(parts[1:])) > 1.0, ratio(parts, added([*parts, parts[0]])) > 1.0]
    assert seen == [is_missing_seen[correlation > 0]] * 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 700, CHUNK, 3 * CHUNK + 9])
def test_energies_are_the_squared_norms_of_chunks(dtype: torch.dtype, size: int) -> None:
    shards = torch.stack(parts_of(2, size, dtype))
    wanted = [torch.stack([chunk.double().square().sum() for chunk in shard.split(CHUNK)]) for shard in shards]
    torch.testing.assert_close(chunk_sums(shards).energies, torch.stack(wanted), rtol=1e-5, atol=0.0)
