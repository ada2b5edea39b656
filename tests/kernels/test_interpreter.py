"""The interpreter computes what a GPU would, where it is mended and where a kernel relies on it."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton has builds for Linux only")
import triton.language as tl  # noqa: E402


@triton.jit
def _rounded(values, out, SIZE: tl.constexpr):
    lanes = tl.arange(0, SIZE)
    tl.store(out + lanes, tl.load(values + lanes).to(tl.bfloat16))


@triton.jit
def _product(left, right, out, SIZE: tl.constexpr):
    lanes = tl.arange(0, SIZE)
    at = lanes[:, None] * SIZE + lanes[None, :]
    tl.store(out + at, tl.dot(tl.load(left + at), tl.load(right + at)))


@triton.jit
def _bounded(values, out, SIZE: tl.constexpr):
    lanes = tl.arange(0, SIZE)
    found = tl.load(values + lanes)
    tl.store(out + lanes, tl.maximum(found, 0.5))
    tl.store(out + SIZE + lanes, tl.maximum(found, 0.5, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def _doubled(values):
    return values + values


@triton.jit
def _total(values, out, count, SIZE: tl.constexpr):
    sums = tl.zeros((SIZE,), tl.float32)
    for start in range(0, count, SIZE):
        lanes = start + tl.arange(0, SIZE)
        sums += _doubled(tl.load(values + lanes, mask=lanes < count, other=0.0))
    tl.store(out, tl.sum(sums, axis=0))


def test_bfloat16_rounds_to_nearest_even(device: torch.device) -> None:
    halves = torch.tensor([1.0 + 2.0**-8, 1.0 + 3 * 2.0**-8, -1.0 - 2.0**-8, 255.5, 3.39e38, float("inf"), 1e-40, 0.1])
    values = torch.cat([halves, torch.randn(248, generator=torch.Generator().manual_seed(0))]).to(device)
    out = torch.empty(256, dtype=torch.bfloat16, device=device)
    _rounded[(1,)](values, out, SIZE=256)
    assert torch.equal(out, values.bfloat16())
    values[0] = float("nan")
    _rounded[(1,)](values, out, SIZE=256)
    assert bool(out[0].isnan())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_products_are_of_values_not_of_bit_patterns(dtype: torch.dtype, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(16, 16, generator=generator).to(device, dtype) for _ in range(2))
    out = torch.empty(16, 16, device=device)
    _product[(1,)](left, right, out, SIZE=16)
    torch.testing.assert_close(out.double(), left.double() @ right.double(), rtol=1e-5, atol=1e-5)


def test_a_maximum_is_a_number_unless_it_is_asked_to_be_none(device: torch.device) -> None:
    values = torch.tensor([float("nan"), -1.0, 2.0, float("nan")], device=device)
    out = torch.empty(8, device=device)
    _bounded[(1,)](values, out, SIZE=4)
    assert out[:4].tolist() == [0.5, 0.5, 2.0, 0.5]
    assert out[4:].isnan().tolist() == [True, False, False, True]


def test_loop_bounds_are_arguments_and_kernels_call_kernels(device: torch.device) -> None:
    values = torch.arange(100, dtype=torch.float32, device=device)
    out = torch.empty(1, device=device)
    _total[(1,)](values, out, 100, SIZE=32)
    assert float(out) == 9900.0


def test_nothing_stays_patched(device: torch.device) -> None:
    """Launches before must leave `triton.language` such that kernels still compile."""
    test_loop_bounds_are_arguments_and_kernels_call_kernels(device)
    from tests.kernels.aot import compile_for

    usage = compile_for("sm_90", _total, {"values": "*fp32", "out": "*fp32", "count": "i32"}, {"SIZE": 1024})
    assert usage.count("FADD") > 0
