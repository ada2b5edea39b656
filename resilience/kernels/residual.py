"""The largest residual ÷ tolerance of a set of sums: the end of every check, compiled where it could be.

With E expected and O observed, row i has ratio_i² = ‖E_i − O_i‖² ÷ (factor²·(‖E_i‖² + mean_i ‖E_i‖²) + tiny). What the
factor means is not known here.
"""

from __future__ import annotations

import torch

from resilience.kernels import triton_kernels
from resilience.kernels.sweep import row_sums_at

try:
    from resilience.kernels import _residual as _compiled
except ImportError:  # built without a C compiler
    _compiled = None  # type: ignore[assignment]

__all__ = ["TINY", "deferred_worst_ratio", "residual_ratios", "worst_ratio", "worst_ratio_of"]

TINY = 1e-36
"""Added to squares of tolerances: keeps 0 ÷ 0 out of the ratio of an empty row. Sums below 1e-18 count as nothing."""


def residual_ratios(
    expected: torch.Tensor, observed: torch.Tensor, factor: float, *, finite_rows: bool = False
) -> torch.Tensor:
    """Ratio of every row, (m,) or (b, m), of sums (m, c) or (b, m, c), on their device; NaN where one is not finite.

    One row that is not finite makes all of them NaN, since the mean is in every tolerance. With `finite_rows` (it waits
    for the device) the others have their own.
    """
    expected, observed = expected.double(), observed.double()  # squares of float32 may overflow
    scale = _energy(expected)
    usual = scale[scale.isfinite()].mean() if finite_rows else scale.mean()
    tolerance = scale.add_(usual).mul_(factor * factor).add_(TINY)
    return _energy(expected - observed).div_(tolerance).sqrt_()


def worst_ratio(expected: torch.Tensor, observed: torch.Tensor, factor: float) -> float:
    """The largest of `residual_ratios`; NaN if one is. Waits for the device."""
    if _compiled is None or not _fits(expected) or not _fits(observed):
        return float(residual_ratios(expected, observed, factor).max())
    rows, count = expected.shape[-2:]
    batches = expected.shape[0] if expected.dim() == 3 else 1
    of_expected, of_observed = _strides(expected), _strides(observed)
    return _compiled.worst(
        expected.data_ptr(), *of_expected, observed.data_ptr(), *of_observed, batches, rows, count, factor, TINY
    )


def worst_ratio_of(matrix: torch.Tensor, right: torch.Tensor, expected: torch.Tensor, factor: float) -> float | None:
    """`worst_ratio` of `expected` and matrix · right, without a tensor for the latter; None where not compiled for it.

    Args:
        matrix: (m, n) or (b, m, n), float32 or bfloat16.
        right: (n, c).
        expected: (m, c) or (b, m, c), each column contiguous.
        factor: as in `residual_ratios`.
    """
    if _compiled is None or not _fits(expected):
        return None
    address = row_sums_at(matrix, right)
    if not address:
        return None
    rows, count = expected.shape[-2:]
    batches = expected.shape[0] if expected.dim() == 3 else 1
    return _compiled.worst(
        expected.data_ptr(), *_strides(expected), address, rows * count, rows, batches, rows, count, factor, TINY
    )


def deferred_worst_ratio(expected: torch.Tensor, observed: torch.Tensor, factor: float) -> torch.Tensor:
    """(largest of `residual_ratios`, 1 if a sum in `expected` is not finite), (2,), on the device and without waiting.

    The sums are float32 or float64 and not empty. The largest ratio is NaN if one is.
    """
    kernels = triton_kernels("checksum.residual", expected)
    if kernels is not None and expected.dtype == torch.float32:
        result: torch.Tensor = kernels.worst_ratio(expected, observed, factor, TINY)
        return result
    ratios = residual_ratios(expected, observed, factor)
    return torch.stack([ratios.max().float(), (~expected.isfinite().all()).float()])


def _fits(sums: torch.Tensor) -> bool:
    return sums.is_cpu and sums.dtype == torch.float32 and sums.stride(-2) == 1 and not sums.is_neg()


def _strides(sums: torch.Tensor) -> tuple[int, int]:
    """(by batch, by column)"""
    return (sums.stride(0), sums.stride(2)) if sums.dim() == 3 else (0, sums.stride(1))


def _energy(sums: torch.Tensor) -> torch.Tensor:
    """Sum of squares of every row of (…, c): c is small, and each column lies contiguous."""
    first, *others = sums.unbind(-1)
    energy = first * first
    for column in others:
        energy.addcmul_(column, column)
    return energy
