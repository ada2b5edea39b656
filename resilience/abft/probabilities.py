"""Softmax of eager attention: every row of P sums to 1.

Shapes: scores and P (…, n), rows over the last dimension. The screen reads P once; suspect rows are computed again in
float64. A row that sees no key (all scores −∞) is NaN by definition and no fault. Elements that swap places within a
row, and in bfloat16 a change of less than about 1 % of a row's mass, are not seen here.
"""

from __future__ import annotations

import functools

import torch

from resilience.abft.checksum import MAX_ROWS, Confirmation, worst_kind
from resilience.abft.sums import sums_of
from resilience.abft.thresholds import probability_factor, row_mass_tolerance

__all__ = ["confirm_softmax", "screen_softmax"]


def screen_softmax(probabilities: torch.Tensor) -> torch.Tensor:
    """|Σ_j P_ij − 1| ÷ tolerance of every row, (rows,); NaN where a sum is not finite."""
    rows = probabilities.reshape(-1, probabilities.shape[-1])
    wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
    sums = sums_of(rows, right=_ones(rows.shape[-1], wide, rows.device)).rows
    assert sums is not None
    tolerance = row_mass_tolerance(**_precision(probabilities.dtype), n=rows.shape[-1])
    return sums[:, 0].sub(1.0).abs_().div_(tolerance)


def confirm_softmax(
    scores: torch.Tensor, probabilities: torch.Tensor, ratio: torch.Tensor, *, tolerance_scale: float = 1.0
) -> Confirmation:
    """Compute suspect rows again in float64 and hold every element against the bound of round-off."""
    n = scores.shape[-1]
    flat = torch.where(ratio.isnan(), torch.inf, ratio)
    suspects = torch.topk(flat, min(MAX_ROWS, flat.numel())).indices
    suspects = suspects[~(flat[suspects] <= 1.0)]
    source = scores.reshape(-1, n)[suspects].double()
    stored = probabilities.reshape(-1, n)[suspects]
    reference = source.softmax(-1)
    limits = torch.finfo(stored.dtype)
    relative = probability_factor(**_precision(stored.dtype), n=n)
    tolerance = (reference * relative + 4.0 * limits.smallest_normal) * tolerance_scale
    error = (stored.double() - reference).abs()
    faulty = ~(error <= tolerance) & reference.isfinite()
    inputs_bad = bool((source.isnan() | (source == torch.inf)).any())
    return Confirmation(worst_kind(stored, error, faulty), inputs_bad)


@functools.lru_cache(maxsize=64)
def _ones(n: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.ones(n, 1, dtype=dtype, device=device)


def _precision(dtype: torch.dtype) -> dict[str, float]:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return {"stored": torch.finfo(dtype).eps / 2, "accumulated": torch.finfo(wide).eps / 2}
