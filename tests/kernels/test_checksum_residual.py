"""The comparison of sums on the device against the one in torch, and what it makes of values that are not finite."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("triton", reason="triton has builds for Linux only")
from resilience.kernels.checksum.residual import worst_ratio
from resilience.kernels.residual import TINY, residual_ratios


def sums(*shape: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Expected, and observed slightly off; vectors of sums lie contiguous, as a sweep leaves them."""
    generator = torch.Generator().manual_seed(0)
    expected = torch.randn(*shape[:-2], shape[-1], shape[-2], generator=generator).mT
    observed = expected + 1e-5 * torch.randn(*shape, generator=generator)
    return expected.to(device), observed.to(device)


@pytest.mark.parametrize("shape", [(1, 1), (5, 2), (257, 3), (700, 4), (3, 130, 2), (40, 7, 8)], ids=str)
@pytest.mark.parametrize("factor", [1e-5, 3e-3])
def test_it_is_the_largest_of_the_ratios(shape: tuple[int, ...], factor: float, device: torch.device) -> None:
    expected, observed = sums(*shape, device=device)
    worst, bad = worst_ratio(expected, observed, factor, TINY).tolist()
    assert worst == pytest.approx(float(residual_ratios(expected, observed, factor).max()), rel=1e-5)
    assert bad == 0.0


def test_many_rows_are_dealt_out_to_programs(device: torch.device) -> None:
    expected, observed = sums(3000, 2, device=device)
    observed[2999, 1] += 1.0
    worst, _ = worst_ratio(expected, observed, 1e-5, TINY).tolist()
    assert worst == pytest.approx(float(residual_ratios(expected, observed, 1e-5)[2999]), rel=1e-5)
    assert worst > 1.0


def test_rows_of_zeros_raise_nothing(device: torch.device) -> None:
    zeros = torch.zeros(300, 2, device=device)
    assert worst_ratio(zeros, zeros, 1e-5, TINY).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("row", [0, 299, 699])
def test_what_is_not_finite_is_an_alarm(value: float, row: int, device: torch.device) -> None:
    expected, observed = sums(700, 2, device=device)
    struck = observed.clone()
    struck[row, 1] = value
    worst, bad = worst_ratio(expected, struck, 1e-5, TINY).tolist()
    assert not worst <= 1.0
    assert bad == 0.0, "the inputs are good"
    struck = expected.clone()
    struck[row, 0] = value
    worst, bad = worst_ratio(struck, observed, 1e-5, TINY).tolist()
    assert not worst <= 1.0
    assert bad == 1.0


def test_sums_whose_squares_overflow_are_an_alarm_with_bad_inputs(device: torch.device) -> None:
    expected = torch.randn(300, 2, generator=torch.Generator().manual_seed(0)).to(device)
    expected[7] *= 1e20
    ratio, bad = worst_ratio(expected, expected.clone(), 1e-5, TINY).tolist()
    assert math.isnan(ratio)
    assert bad == 1.0
