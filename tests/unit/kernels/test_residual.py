"""The comparison of sums: compiled and in torch the same, NaN never lost."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resilience.kernels import residual
from resilience.kernels.residual import deferred_worst_ratio, residual_ratios, worst_ratio, worst_ratio_of
from resilience.kernels.sweep import sweep


def sums(batch: int, rows: int, count: int, seed: int, *, wider: int = 0) -> torch.Tensor:
    """As a sweep leaves them: each column contiguous, maybe the first of several columns."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, count + wider, rows) if batch else (count + wider, rows)
    return torch.randn(shape, generator=generator).mT[..., :count]


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(0, 3),
    rows=st.integers(1, 40),
    count=st.integers(1, 5),
    wider=st.integers(0, 3),
    seed=st.integers(0, 10**6),
)
def test_both_forms_agree(batch: int, rows: int, count: int, wider: int, seed: int) -> None:
    expected = sums(batch, rows, count, seed, wider=wider)
    observed = expected + 1e-3 * sums(batch, rows, count, seed + 1)
    reference = residual_ratios(expected.double(), observed.double(), 1e-3)
    assert reference.shape == expected.shape[:-1]
    assert worst_ratio(expected, observed, 1e-3) == pytest.approx(float(reference.max()), rel=1e-4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(residual, "_compiled", None)
        assert worst_ratio(expected, observed, 1e-3) == pytest.approx(float(reference.max()), rel=1e-3)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["expected", "observed"])
@pytest.mark.parametrize("row", [0, 7, 29])
def test_what_is_not_finite_is_never_a_small_ratio(
    compiled: bool, bad: float, side: str, row: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        monkeypatch.setattr(residual, "_compiled", None)
    pair = {"expected": sums(2, 30, 2, 1), "observed": sums(2, 30, 2, 1)}
    assert worst_ratio(**pair, factor=1e-3) == 0.0
    pair[side] = pair[side].clone()
    pair[side][1, row, 1] = bad
    assert not worst_ratio(**pair, factor=1e-3) <= 1.0


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(0, 3),
    rows=st.integers(1, 300),
    columns=st.integers(1, 200),
    count=st.integers(1, 5),
    transposed=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 10**6),
)
def test_sums_that_are_never_a_tensor_are_compared_the_same(
    batch: int, rows: int, columns: int, count: int, transposed: bool, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    lengths = (columns, rows) if transposed else (rows, columns)
    matrix = torch.randn((batch, *lengths) if batch else lengths, generator=generator).to(dtype)
    matrix = matrix.mT if transposed else matrix
    weights = torch.randn(count, columns, generator=generator).mT
    observed = sweep(matrix, weights).rows
    assert observed is not None
    expected = observed * 1.001
    ratio = worst_ratio_of(matrix, weights, expected, 1e-3)
    assert ratio == worst_ratio(expected, observed, 1e-3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(residual, "_compiled", None)
        assert worst_ratio_of(matrix, weights, expected, 1e-3) is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_what_the_compiled_form_does_not_read_is_left_to_others(dtype: torch.dtype) -> None:
    matrix, weights = torch.ones(4, 6, dtype=dtype), torch.ones(2, 6).mT
    assert worst_ratio_of(matrix, weights, torch.ones(2, 4).mT, 1e-3) is None


def test_sums_of_nothing_are_nothing() -> None:
    zero = torch.zeros(2, 5).mT
    assert worst_ratio(zero, zero, 1e-3) == 0.0


def test_the_compiled_form_is_in_use_here() -> None:
    assert residual._compiled is not None


def test_one_huge_row_hides_no_fault_in_others() -> None:
    """Where squares of float32 would be infinite."""
    expected = torch.randn(100, 2, generator=torch.Generator().manual_seed(0)).T.contiguous().T
    expected[0] *= 1e20
    assert worst_ratio(expected, expected.clone(), 1e-5) == 0.0
    observed = expected.clone()
    observed[0] *= 2.0
    for found in (
        worst_ratio(expected, observed, 1e-5),
        float(residual_ratios(expected, observed, 1e-5).max()),
        float(deferred_worst_ratio(expected, observed, 1e-5)[0]),
    ):
        assert found > 1e3
