"""The sums of `sweep.py` as their definition reads, in float64 torch. What the kernel is tested against."""

from __future__ import annotations

import torch

__all__ = ["count_not_finite", "largest_finite", "roundoff", "weighted_sums"]


def weighted_sums(matrix: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """matrix · weights in float64, (…, m, c). The sums of columns are those of the transposed matrix."""
    return matrix.double() @ weights.double()


def roundoff(matrix: torch.Tensor, weights: torch.Tensor, *, length: int) -> torch.Tensor:
    """Bound on what float32 arithmetic makes of `weighted_sums`, (…, m, c): no term takes part in more than `length`
    roundings, each of half a unit in the last place of something at most Σ |matrix|·|weights|, and subnormals are lost.
    """
    return length * 2.0**-24 * (matrix.double().abs() @ weights.double().abs()) * 1.01 + matrix.shape[-1] * 2.0**-126


def largest_finite(matrix: torch.Tensor) -> float:
    """The largest finite magnitude, 0 if there is none."""
    finite = matrix.double().abs()[matrix.isfinite()]
    return float(finite.max()) if finite.numel() else 0.0


def count_not_finite(matrix: torch.Tensor) -> int:
    """How many elements are INF or NaN."""
    return int((~matrix.isfinite()).sum())
