"""What the user lets products be computed with, and what becomes of it in the bounds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from resilience.abft.arithmetic import matmul_precision, operand_roundoff, precision_of
from resilience.abft.thresholds import carried_variance_factors, element_factors

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SETTINGS = (
    "allow_tf32",
    "allow_fp16_accumulation",
    "allow_fp16_reduced_precision_reduction",
    "allow_bf16_reduced_precision_reduction",
)


@pytest.fixture
def settings_of_cuda() -> Iterator[Any]:
    """They are attributes without a place: what puts one back must set it."""
    settings = torch.backends.cuda.matmul
    before = [getattr(settings, name) for name in SETTINGS]
    yield settings
    for name, value in zip(SETTINGS, before, strict=True):
        setattr(settings, name, value)


def on_cuda() -> list[str]:
    with FakeTensorMode():
        return [matmul_precision(torch.empty(2, 2, dtype=dtype, device="cuda")) for dtype in DTYPES]


def test_products_on_a_gpu_are_as_the_user_lets_them_be(settings_of_cuda: Any) -> None:
    assert on_cuda() == ["split", "split", "ieee", "ieee"]
    settings_of_cuda.allow_tf32 = True
    settings_of_cuda.allow_fp16_accumulation = True
    settings_of_cuda.allow_bf16_reduced_precision_reduction = False
    assert on_cuda() == ["fp16", "ieee", "tf32", "ieee"]
    settings_of_cuda.allow_fp16_accumulation = False
    settings_of_cuda.allow_fp16_reduced_precision_reduction = False
    assert on_cuda() == ["ieee", "ieee", "tf32", "ieee"]


def test_settings_of_a_gpu_are_nothing_to_a_cpu(settings_of_cuda: Any) -> None:
    settings_of_cuda.allow_tf32 = settings_of_cuda.allow_fp16_accumulation = True
    assert [matmul_precision(torch.empty(2, 2, dtype=dtype)) for dtype in DTYPES] == ["ieee"] * 4


def test_sums_in_float16_and_split_ones_are_less_exact() -> None:
    assert precision_of(torch.float16, "fp16").accumulated == 2.0**-11
    assert precision_of(torch.float16, "split").accumulated == 2.0**-24
    assert precision_of(torch.float16, "split").split == precision_of(torch.float16, "fp16").split == 4 * 2.0**-11
    assert precision_of(torch.bfloat16, "split").split == 4 * 2.0**-8
    assert precision_of(torch.float64, "ieee", torch.float32).checked == 2.0**-24
    assert operand_roundoff("split") == operand_roundoff("fp16") == operand_roundoff("ieee") == 0.0


@pytest.mark.parametrize("k", [1, 64, 4096])
def test_a_split_sum_widens_every_bound(k: int) -> None:
    """Parts of 8 that are rounded to bfloat16 before they are added stay within the bounds of `split`."""
    plain, split = (precision_of(torch.bfloat16, name) for name in ("ieee", "split"))
    assert element_factors(split, k=k, smallest_normal=0.0).relative >= 5 * 2.0**-8
    assert carried_variance_factors(split, k=k, n=8).stored > 16 * carried_variance_factors(plain, k=k, n=8).stored
    generator = torch.Generator().manual_seed(k)
    a, b = (torch.randn(64, k, generator=generator).bfloat16().float() for _ in range(2))
    parts = [(left @ right.mT).bfloat16() for left, right in zip(a.chunk(8, 1), b.chunk(8, 1), strict=True)]
    result = torch.stack(parts).sum(0).double()
    reference, magnitude = a.double() @ b.double().mT, (a.abs() @ b.abs().mT).double()
    bounds = element_factors(split, k=k, smallest_normal=0.0)
    assert ((result - reference).abs() <= bounds.relative * reference.abs() + bounds.accumulated * magnitude).all()
