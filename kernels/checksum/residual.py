"""The end of a check on the device: the largest residual ÷ tolerance of a set of sums, in two launches.

With E expected and O observed, (b, m, c) float32, row i has
ratio_i² = ‖E_i − O_i‖² ÷ (factor²·(‖E_i‖² + mean ‖E‖²) + tiny). The first launch adds up ‖E‖² over blocks of rows, the
second one divides. Nothing waits for the device, and a largest value does not depend on the order in which it is found.
"""

# Triton has no types, and reads arguments of kernels by its own rules.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl

__all__ = ["MAX_PARTS", "MIN_ROWS", "energy_kernel", "ratio_kernel", "worst_ratio"]

_NAN_BITS: tl.constexpr = tl.constexpr(0x7FC00000)
"""As an integer above every other: an ordinary maximum lets a NaN through."""

_LARGEST: tl.constexpr = tl.constexpr(1e15)
"""Sums beyond it count as not finite: their squares, added up over all rows, may be."""

MAX_PARTS = 1024
"""Blocks of the first launch; each program of the second one adds up all of them."""

MIN_ROWS = 256


@triton.jit
def _sums(sums, rows, inside, num_rows, stride_b, stride_m, stride_c, NUM: tl.constexpr, PADDED: tl.constexpr):
    """Sums of the rows, counted through all matrices: (BLOCK, PADDED) float32, zero outside."""
    columns = tl.arange(0, PADDED)
    at = (rows // num_rows).to(tl.int64) * stride_b + (rows % num_rows).to(tl.int64) * stride_m
    mask = inside[:, None] & (columns < NUM)[None, :]
    return tl.load(sums + at[:, None] + columns[None, :].to(tl.int64) * stride_c, mask=mask, other=0.0)


@triton.jit(do_not_specialize=["num_rows", "total_rows", "rows_per_program"])
def energy_kernel(
    expected, parts, result, num_rows, total_rows, rows_per_program,
    stride_b, stride_m, stride_c,
    NUM: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """parts[program] = Σ ‖E_i‖² over its rows; result (2,) = 0."""
    program = tl.program_id(0)
    first = program * rows_per_program
    last = tl.minimum(first + rows_per_program, total_rows)
    energy = tl.zeros((BLOCK,), tl.float32)
    for start in range(first, last, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        e = _sums(expected, rows, rows < last, num_rows, stride_b, stride_m, stride_c, NUM, PADDED)
        energy += tl.sum(e * e, axis=1)
    tl.store(parts + program, tl.sum(energy, axis=0))
    if program == 0:
        tl.store(result, 0.0)
        tl.store(result + 1, 0.0)


@triton.jit(do_not_specialize=["num_parts", "num_rows", "total_rows", "rows_per_program"])
def ratio_kernel(
    expected, observed, parts, result, num_parts, num_rows, total_rows, rows_per_program, factor, tiny,
    expected_b, expected_m, expected_c, observed_b, observed_m, observed_c,
    NUM: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """result[0] = largest ratio, NaN if one is; result[1] = 1 if an expected sum is not finite or too large."""
    lanes = tl.arange(0, PARTS)
    mean = tl.sum(tl.load(parts + lanes, mask=lanes < num_parts, other=0.0), axis=0) / total_rows
    first = tl.program_id(0) * rows_per_program
    last = tl.minimum(first + rows_per_program, total_rows)
    largest = tl.zeros((BLOCK,), tl.int32)
    bad = tl.zeros((BLOCK,), tl.int32)
    for start in range(first, last, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        inside = rows < last
        e = _sums(expected, rows, inside, num_rows, expected_b, expected_m, expected_c, NUM, PADDED)
        o = _sums(observed, rows, inside, num_rows, observed_b, observed_m, observed_c, NUM, PADDED)
        difference = tl.sum((e - o) * (e - o), axis=1)
        squared = difference / (factor * factor * (tl.sum(e * e, axis=1) + mean) + tiny)
        ratio = tl.sqrt(squared)
        too_large = tl.max(tl.where(tl.abs(e) < _LARGEST, 0, 1), axis=1)
        bits = tl.where((ratio != ratio) | (too_large > 0), _NAN_BITS, ratio.to(tl.int32, bitcast=True))
        largest = tl.maximum(largest, tl.where(inside, bits, 0))
        bad = tl.maximum(bad, too_large)
    # Ratios are not negative, so their order is that of their bits.
    bits_of_result = result.to(tl.pointer_type(tl.int32), bitcast=True)
    tl.atomic_max(bits_of_result, tl.max(largest, axis=0))
    tl.atomic_max(bits_of_result + 1, tl.max(bad, axis=0) * 0x3F800000)  # the bits of 1.0


def worst_ratio(expected: torch.Tensor, observed: torch.Tensor, factor: float, tiny: float) -> torch.Tensor:
    """(largest ratio, 1 if an expected sum is not finite), (2,) float32 on the device; the ratio is NaN if one is.

    Sums above 1e15 count as not finite.

    Args:
        expected: (m, c) or (b, m, c) float32, not empty, any strides.
        observed: of the same shape.
        factor: of the tolerance.
        tiny: keeps 0 ÷ 0 out of an empty row.
    """
    if expected.dim() == 2:
        expected, observed = expected[None], observed[None]
    num_matrices, num_rows, num_columns = expected.shape
    total_rows = num_matrices * num_rows
    padded = triton.next_power_of_2(num_columns)
    rows_per_program = max(MIN_ROWS, triton.cdiv(total_rows, MAX_PARTS))
    num_parts = triton.cdiv(total_rows, rows_per_program)
    parts = torch.empty(num_parts, dtype=torch.float32, device=expected.device)
    result = torch.empty(2, dtype=torch.float32, device=expected.device)
    shape = {"NUM": num_columns, "PADDED": padded, "BLOCK": MIN_ROWS}
    energy_kernel[(num_parts,)](
        expected, parts, result, num_rows, total_rows, rows_per_program, *expected.stride(), **shape, num_warps=4
    )  # fmt: skip
    ratio_kernel[(num_parts,)](
        expected, observed, parts, result, num_parts, num_rows, total_rows, rows_per_program, factor, tiny,
        *expected.stride(), *observed.stride(), **shape, PARTS=MAX_PARTS, num_warps=4,
    )  # fmt: skip
    return result
