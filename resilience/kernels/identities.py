"""How far sums and extremes are apart, component by component: the end of fused attention's checks, compiled where it
could be.

Tables of sums are (4, b, h, d), under the columns of `lengthwise.pair_sums`: ones, then three of random signs, by which
the sum of squares of a component's terms is estimated. Two sides agree where

    |Σ one − Σ other| ≤ random·√(Σ one² + Σ other²) + coherent·min(|Σ one|, |Σ other|).

What the factors mean is not known here, nor what the sums are of.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

try:
    from resilience.kernels import _identities as _compiled
except ImportError:  # built without a C compiler
    _compiled = None  # type: ignore[assignment]

__all__ = ["TINY", "Side", "estimated", "excess_ratio", "identity_ratio", "side_ratio"]

TINY = 1e-17
"""Added to tolerances: what is smaller counts as nothing, since squares of it may be 0 in float32."""


class Side(NamedTuple):
    """One side of an identity, (b, h, d) each."""

    total: torch.Tensor
    """Sums of the terms over the length."""
    squares: torch.Tensor
    """Sums of their squares."""

    def shared(self, key_heads: int) -> Side:
        """Summed over the query heads that share a key head: (b, hq, d) to (b, hk, d)."""
        return Side(_share(self.total, key_heads), _share(self.squares, key_heads))


def identity_ratio(
    one: torch.Tensor,
    other: torch.Tensor,
    random: float,
    coherent: float,
    *,
    rows: torch.Tensor | None = None,
    row_weight: float = 0.0,
    beside: torch.Tensor | None = None,
) -> float:
    """The worst residual ÷ tolerance of an identity; NaN where something is not finite, or its square is not.

    Args:
        one: (4, b, hk, d), float32, on a CPU.
        other: (4, b, hq, d), hq a multiple of hk: sums over the heads that share a key head.
        random: factor.
        coherent: factor.
        rows: (4, b, hq, d). With it `one` is to be 0: the terms of `other` count by their squares only, times
            `row_weight` and the squares of this, summed over the components of a head.
        row_weight: see there.
        beside: (4, b, hq, d), of which only is asked whether it is finite, squared.
    """
    if _compiled is not None:
        found = _compiled.identity(one, other, random, coherent, TINY, rows, row_weight, beside)
        if found is not None:
            return found
    heads, theirs = one.shape[2], estimated(other)
    if rows is not None:
        squares = theirs.squares * (row_weight * estimated(rows).squares.sum(2, keepdim=True))
        theirs = Side(torch.zeros_like(squares), squares)
    worst = side_ratio(estimated(one), theirs.shared(heads), random, coherent)
    return float(worst if beside is None else worst + beside.square().sum() * 0.0)


def estimated(sums: torch.Tensor) -> Side:
    """From a table of sums. Half of the estimated squares are the component's own, of three sets of signs, and half the
    mean of its head's: neither a component far above the others nor a low estimate widens the gap.
    """
    own = sums[1:].square().mean(0)
    return Side(sums[0], torch.lerp(own, own.mean(2, keepdim=True), 0.5))


def side_ratio(
    one: Side,
    other: Side,
    random: torch.Tensor | float,
    coherent: torch.Tensor | float,
    absolute: torch.Tensor | float = 0.0,
) -> torch.Tensor:
    """The worst ratio, a scalar on the sides' device; NaN or infinite where a sum, or its scale, is not finite.

    `absolute`: what of the tolerance does not shrink with the terms.
    """
    residual = (one.total - other.total).abs()
    squares = one.squares + other.squares
    tolerance = random * squares.sqrt() + coherent * torch.minimum(one.total.abs(), other.total.abs())
    return (residual / (tolerance + absolute + TINY) + squares * 0.0).max()


def excess_ratio(inner: torch.Tensor, outer: torch.Tensor, factor: float, *, with_zero: bool = False) -> torch.Tensor:
    """How far the worst component lies outside of its range ÷ (factor · the range's larger end), a scalar; 0 inside.

    NaN where something is not a number. Does not wait for a device.

    Args:
        inner: (2, b, hq, d), smallest and largest, as of `lengthwise.extremes`.
        outer: (2, b, hk, d), the range, hq a multiple of hk.
        factor: of the tolerance.
        with_zero: whether 0 belongs to every range.
    """
    if _compiled is not None and inner.is_cpu:
        found = _compiled.excess(inner, outer, factor, TINY, with_zero)
        if found is not None:
            return torch.tensor(found, dtype=torch.float32, device="cpu")
    low, high = outer.repeat_interleave(inner.shape[2] // outer.shape[2], dim=2)
    if with_zero:
        low, high = low.clamp(max=0), high.clamp(min=0)
    tolerance = torch.maximum(low.abs(), high.abs()) * factor + TINY
    return (torch.maximum(low - inner[0], inner[1] - high) / tolerance).clamp(min=0).max()


def _share(of_query_heads: torch.Tensor, key_heads: int) -> torch.Tensor:
    if of_query_heads.shape[1] == key_heads:
        return of_query_heads
    batch, _, *rest = of_query_heads.shape
    return of_query_heads.reshape(batch, key_heads, -1, *rest).sum(2)
