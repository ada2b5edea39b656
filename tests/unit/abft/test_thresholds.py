"""Properties of the pure numbers."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilience.abft.thresholds import (
    NEAR_INF_SHARE,
    Precision,
    classify,
    element_factors,
    invariant_factor,
    probability_factor,
    row_mass_tolerance,
    screen_factor,
)
from resilience.events import DetectionKind

FP32 = Precision(stored=2.0**-24, accumulated=2.0**-24, checked=2.0**-24)
BF16 = Precision(stored=2.0**-8, accumulated=2.0**-24, checked=2.0**-8)
sizes = st.integers(1, 1 << 20)


@given(k=sizes, n=sizes, columns=st.integers(1, 64))
def test_screen_is_wider_for_longer_sums_and_coarser_numbers(k: int, n: int, columns: int) -> None:
    factor = screen_factor(FP32, k=k, n=n, columns=columns)
    assert 0 < factor < screen_factor(BF16, k=k, n=n, columns=columns)
    assert factor <= screen_factor(FP32, k=2 * k, n=n, columns=columns)
    assert factor <= screen_factor(FP32, k=k, n=2 * n, columns=columns)
    assert factor >= screen_factor(FP32, k=k, n=n, columns=columns + 1)


def test_screen_of_bfloat16_stays_far_below_one() -> None:
    # A factor near 1 would let any change of a row's energy pass.
    assert screen_factor(BF16, k=4096, n=4096, columns=8) < 0.05


def test_rounded_operands_widen_the_screen() -> None:
    tf32 = Precision(stored=2.0**-24, accumulated=2.0**-24, checked=2.0**-24, operand=2.0**-11)
    assert screen_factor(tf32, k=64, n=64, columns=2) > 100 * screen_factor(FP32, k=64, n=64, columns=2)


@given(k=sizes)
def test_element_bound_holds_one_rounding_and_never_exceeds_the_worst_case(k: int) -> None:
    factors = element_factors(BF16, k=k, smallest_normal=1e-38)
    assert factors.relative >= BF16.stored
    assert factors.accumulated <= 2.0 * BF16.accumulated * (k + 2)
    assert factors.absolute > 0


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (math.nan, DetectionKind.NAN),
        (-math.inf, DetectionKind.INF),
        (-0.9 * 3e38, DetectionKind.NEAR_INF),
        (NEAR_INF_SHARE * 3e38 * 0.99, DetectionKind.MISMATCH),
        (0.0, DetectionKind.MISMATCH),
    ],
)
def test_classification_names_what_stands_there(value: float, kind: DetectionKind) -> None:
    assert classify(value, 3e38) is kind


@given(n=sizes)
def test_probability_bounds_grow_with_the_row_and_hold_a_rounding(n: int) -> None:
    bounds = {"stored": 2.0**-8, "accumulated": 2.0**-24}
    assert row_mass_tolerance(**bounds, n=n) >= 2 * 2.0**-8
    assert row_mass_tolerance(**bounds, n=n) <= row_mass_tolerance(**bounds, n=n + 1)
    assert probability_factor(**bounds, n=n) >= 2.0**-8


@given(length=sizes, width=st.integers(1, 512))
def test_identities_are_tight_in_float32_and_coarse_in_bfloat16(length: int, width: int) -> None:
    tight = invariant_factor(stored=2.0**-24, accumulated=2.0**-24, length=length, width=width)
    coarse = invariant_factor(stored=2.0**-8, accumulated=2.0**-24, length=length, width=width)
    assert tight < 1e-3 < coarse < 0.1
