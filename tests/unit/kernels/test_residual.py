"""The comparison of sums: compiled and in torch the same, NaN never lost."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resilience.kernels import residual
from resilience.kernels.residual import deferred_worst_ratio, residual_ratios, worst_ratio_of
from resilience.kernels.sweep import sweep

FACTOR = 1e-3


def numbers(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weights_of(columns: int, count: int) -> torch.Tensor:
    return numbers(count, columns, seed=2).mT


def observed(matrix: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    rows = sweep(matrix, weights).rows
    assert rows is not None
    return rows


def ratio_of(
    matrix: torch.Tensor,
    weights: torch.Tensor,
    sums: torch.Tensor,
    *,
    alpha: float = 1.0,
    addend: torch.Tensor | None = None,
    beta: float = 1.0,
) -> float:
    """By the compiled form."""
    ratio = worst_ratio_of(matrix, weights, sums, FACTOR, alpha=alpha, addend=addend, beta=beta)
    assert ratio is not None
    return ratio


@settings(max_examples=80, deadline=None)
@given(
    batch=st.integers(0, 3),
    rows=st.integers(1, 300),
    columns=st.integers(1, 200),
    count=st.integers(1, 5),
    wider=st.integers(0, 3),
    transposed=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    alpha=st.sampled_from([1.0, 0.125, -2.5]),
    addend=st.sampled_from(["none", "one row", "every row", "every matrix"]),
    beta=st.sampled_from([1.0, 0.5]),
)
def test_the_compiled_form_finds_the_largest_ratio(
    batch: int,
    rows: int,
    columns: int,
    count: int,
    wider: int,
    transposed: bool,
    dtype: torch.dtype,
    alpha: float,
    addend: str,
    beta: float,
) -> None:
    lengths = (columns, rows) if transposed else (rows, columns)
    matrix = numbers(*((batch, *lengths) if batch else lengths)).to(dtype)
    matrix = matrix.mT if transposed else matrix
    weights = weights_of(columns, count)
    added = {
        "none": None,
        "one row": numbers(count, 1, seed=3).mT,
        "every row": numbers(count, rows, seed=3).mT,
        "every matrix": numbers(*([batch] if batch else []), count, rows, seed=3).mT,
    }[addend]
    found = observed(matrix, weights)
    wanted = found * 1.001 + 1e-3 * numbers(*found.shape, seed=4)
    product = (wanted - (0.0 if added is None else beta * added)) / alpha
    # As a sweep leaves them: each column contiguous, maybe the first of several columns.
    sums = torch.cat([product.mT, torch.full((*product.mT.shape[:-2], wider, rows), math.nan)], -2).mT
    expected = alpha * product.double() + (0.0 if added is None else beta * added.double())
    reference = float(residual_ratios(expected, found, FACTOR).max())
    assert ratio_of(matrix, weights, sums, alpha=alpha, addend=added, beta=beta) == pytest.approx(reference, rel=1e-3)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["matrix", "sums", "addend"])
@pytest.mark.parametrize("row", [0, 7, 29])
def test_what_is_not_finite_is_never_a_small_ratio(bad: float, side: str, row: int) -> None:
    matrix, weights = numbers(2, 30, 70), weights_of(70, 2)
    parts = {"matrix": matrix, "sums": observed(matrix, weights), "addend": torch.zeros(2, 2, 30).mT}

    def both() -> tuple[float, float]:
        expected = parts["sums"] + parts["addend"]
        torchs = residual_ratios(expected, observed(parts["matrix"], weights), FACTOR).max()
        return float(torchs), ratio_of(parts["matrix"], weights, parts["sums"], addend=parts["addend"])

    assert max(both()) <= 1e-3
    parts[side] = parts[side].clone()
    parts[side][1, row, 1] = bad
    assert not any(ratio <= 1.0 for ratio in both())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_what_the_compiled_form_does_not_read_is_left_to_others(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix, weights, sums = torch.ones(4, 6), torch.ones(2, 6).mT, torch.ones(2, 4).mT
    assert worst_ratio_of(matrix.to(dtype), weights, sums, FACTOR) is None
    assert worst_ratio_of(matrix, weights, sums.to(dtype), FACTOR) is None
    assert worst_ratio_of(matrix, weights, sums[:, :1], FACTOR) is None
    assert worst_ratio_of(matrix, weights, sums, FACTOR, addend=torch.ones(3, 2)) is None
    assert worst_ratio_of(matrix[:, ::2], torch.ones(2, 3).mT, sums, FACTOR) is None
    monkeypatch.setattr(residual, "_compiled", None)
    assert worst_ratio_of(matrix, weights, sums, FACTOR) is None


def test_sums_of_nothing_are_nothing() -> None:
    zero = torch.zeros(2, 5).mT
    assert float(residual_ratios(zero, zero, FACTOR).max()) == 0.0
    assert ratio_of(torch.zeros(5, 7), weights_of(7, 2), zero) == 0.0


def test_the_compiled_form_is_in_use_here() -> None:
    assert residual._compiled is not None


def test_a_huge_row_hides_no_fault_of_its_own() -> None:
    """Where squares of float32 would be infinite."""
    matrix, weights = numbers(100, 40), weights_of(40, 2)
    matrix[0] *= 1e20
    expected = observed(matrix, weights)
    assert ratio_of(matrix, weights, expected) == 0.0
    struck = matrix.clone()
    struck[0] *= 2.0
    for found in (
        ratio_of(struck, weights, expected),
        float(residual_ratios(expected, observed(struck, weights), FACTOR).max()),
        float(deferred_worst_ratio(expected, observed(struck, weights), FACTOR)[0]),
    ):
        assert found > 100.0


def test_a_row_far_above_all_others_widens_their_tolerance() -> None:
    """A limit: the mean energy of all rows is in every tolerance, since the estimate of a row may be low by chance."""
    matrix, weights = numbers(1000, 40), weights_of(40, 2)
    struck = matrix.clone()
    struck[7] *= 3.0
    alone = ratio_of(struck, weights, observed(matrix, weights))
    matrix[0] *= 1000.0
    struck[0] *= 1000.0
    beside = ratio_of(struck, weights, observed(matrix, weights))
    assert alone > 1.0
    assert alone / 60.0 < beside < alone / 10.0, "√(1000² ÷ 1000 rows), roughly"
