"""Softmax of eager attention: every row of P sums to 1, and every row of dS = P∘(dP − D) to 0.

Shapes: scores, P, dP and dS (…, n), rows over the last dimension, D_i = Σ_j P_ij·dP_ij. The screens read the result
once; suspect rows are computed again in float64. A row that sees no key (all scores −∞) is NaN by definition and no
fault. Elements that swap places within a row, and in bfloat16 a change of less than about 1 % of a row's mass, are not
seen here.
"""

from __future__ import annotations

import functools

import torch

from resilience.abft.checksum import MAX_ROWS, Confirmation, worst_kind
from resilience.abft.sums import beside, sums_of, vectors
from resilience.abft.thresholds import (
    gradient_factor,
    gradient_mass_factor,
    probability_factor,
    row_mass_tolerance,
    screen_grain,
)

__all__ = [
    "confirm_gradient",
    "confirm_softmax",
    "screen_gradient",
    "screen_softmax",
    "unusable_for_gradient",
    "unusable_for_softmax",
]

_TINY = 1e-36


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
    keyless, bad = unusable_for_softmax(scores)
    suspects = _suspects(ratio, keyless | bad)
    source = scores.reshape(-1, n)[suspects].double()
    stored = probabilities.reshape(-1, n)[suspects]
    reference = source.softmax(-1)
    limits = torch.finfo(stored.dtype)
    relative = probability_factor(**_precision(stored.dtype), n=n)
    tolerance = (reference * relative + 4.0 * limits.smallest_normal) * tolerance_scale
    error = (stored.double() - reference).abs()
    faulty = ~(error <= tolerance) & reference.isfinite()
    return Confirmation(worst_kind(stored, error, faulty), bool(bad.any()))


def unusable_for_softmax(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows that see no key, rows whose scores are NaN or infinite), (rows,) each."""
    top = scores.amax(-1).flatten()
    return top == -torch.inf, top.isnan() | (top == torch.inf)


def screen_gradient(gradient: torch.Tensor) -> torch.Tensor:
    """|Σ_j dS_ij| ÷ tolerance of every row, (rows,); NaN where a sum is not finite.

    The tolerance comes from the row's own energy, estimated in the same pass by sums with random signs: a fault widens
    it by its own size times a factor far below 1, so it cannot hide. Rows that cancel what is large beside them may
    exceed it; the confirmation knows their inputs.
    """
    rows = gradient.reshape(-1, gradient.shape[-1])
    n = rows.shape[-1]
    wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
    sums = sums_of(rows, right=_mass_and_signs(n, rows.dtype, wide, rows.device)).rows
    assert sums is not None
    mass, *signed = sums.unbind(-1)
    energy = signed[0].square()
    for column in signed[1:]:
        energy.addcmul_(column, column)
    factor = gradient_mass_factor(**_precision(gradient.dtype), n=n)
    usual = energy.nan_to_num(0.0, 0.0, 0.0).mean() / len(signed)  # one bad row says nothing about the others
    limits = torch.finfo(gradient.dtype)
    grain = screen_grain(limits.smallest_normal * limits.eps, n=n, columns=1)
    tolerance = energy.div_(len(signed)).add_(usual).mul_(factor * factor).add_(grain * grain + _TINY).sqrt_()
    # A value near the largest number makes its own tolerance infinite, and must not hide behind it.
    return mass.abs().div_(tolerance).add_(tolerance.mul_(0.0))


def confirm_gradient(
    d_probabilities: torch.Tensor,
    probabilities: torch.Tensor,
    gradient: torch.Tensor,
    ratio: torch.Tensor,
    *,
    tolerance_scale: float = 1.0,
) -> Confirmation:
    """Compute suspect rows of dS again in float64 and hold every element against the bound of round-off."""
    n = gradient.shape[-1]
    keyless, bad = unusable_for_gradient(d_probabilities, probabilities)
    suspects = _suspects(ratio, keyless | bad)
    incoming = d_probabilities.reshape(-1, n)[suspects].double()
    weights = probabilities.reshape(-1, n)[suspects].double()
    stored = gradient.reshape(-1, n)[suspects]
    weighted = weights * incoming
    reference = weighted - weights * weighted.sum(-1, keepdim=True)
    size = weights * (incoming.abs() + weighted.abs().sum(-1, keepdim=True))
    limits = torch.finfo(stored.dtype)
    factors = _precision(stored.dtype)
    relative = 1.01 * factors["stored"]
    tolerance = reference.abs() * relative + size * gradient_factor(**factors, n=n) + 4.0 * limits.smallest_normal
    error = (stored.double() - reference).abs()
    faulty = ~(error <= tolerance * tolerance_scale) & reference.isfinite()
    return Confirmation(worst_kind(stored, error, faulty), bool(bad.any()))


def unusable_for_gradient(
    d_probabilities: torch.Tensor, probabilities: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows that see no key, other rows whose inputs are not finite), (rows,) each.

    A row of P that is NaN throughout saw no key: its forward has been checked. By reductions only: on a GPU this is
    asked of every call, and P is the largest tensor of eager attention.
    """
    n = probabilities.shape[-1]
    weights, incoming = probabilities.reshape(-1, n), d_probabilities.reshape(-1, n)
    # Nothing is zero, and without what is NaN nothing is left.
    is_full = torch.linalg.vector_norm(weights, 0, dim=-1, dtype=torch.promote_types(weights.dtype, torch.float32)) == n
    keyless = is_full & (weights.nansum(-1) == 0.0)
    finite = [extreme.isfinite() for rows in (weights, incoming) for extreme in rows.aminmax(dim=-1)]
    return keyless, ~(torch.stack(finite).all(0) | keyless)


def _suspects(ratio: torch.Tensor, exempt: torch.Tensor) -> torch.Tensor:
    """The rows over their tolerance but for the exempt ones, the worst `MAX_ROWS` of them."""
    flat = torch.where(ratio.isnan(), torch.inf, ratio).masked_fill_(exempt, 0.0)
    suspects = torch.topk(flat, min(MAX_ROWS, flat.numel())).indices
    return suspects[~(flat[suspects] <= 1.0)]


@functools.lru_cache(maxsize=64)
def _mass_and_signs(n: int, stored: torch.dtype, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return beside(_ones(n, dtype, device), vectors(n, torch.empty(0, dtype=stored, device=device)))


@functools.lru_cache(maxsize=64)
def _ones(n: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.ones(n, 1, dtype=dtype, device=device)


def _precision(dtype: torch.dtype) -> dict[str, float]:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return {"stored": torch.finfo(dtype).eps / 2, "accumulated": torch.finfo(wide).eps / 2}
