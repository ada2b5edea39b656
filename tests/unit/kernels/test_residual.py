"""The comparison of sums: compiled and in torch the same, NaN never lost."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resilience.kernels import residual
from resilience.kernels.residual import residual_ratios, worst_ratio


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


def test_sums_of_nothing_are_nothing() -> None:
    zero = torch.zeros(2, 5).mT
    assert worst_ratio(zero, zero, 1e-3) == 0.0


def test_the_compiled_form_is_in_use_here() -> None:
    assert residual._compiled is not None
