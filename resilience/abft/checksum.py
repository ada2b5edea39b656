"""Checksums of one GEMM in torch: the screen of every call, and the confirmation of suspect rows.

The arithmetic that `thresholds.py` describes. No state, no sites, no decisions about mending. Shapes: m×k by k×n, or b
of them; c checksum columns.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import torch

from resilience.abft.arithmetic import matmul_precision, precision_of
from resilience.abft.expectation import Expectation, swallowing
from resilience.abft.gemm import Gemm
from resilience.abft.sums import vectors
from resilience.abft.thresholds import LONG, classify, element_factors, screen_factor, screen_grain
from resilience.events import DetectionKind
from resilience.kernels.residual import deferred_worst_ratio, residual_ratios, worst_ratio_of

__all__ = [
    "MAX_ROWS",
    "Confirmation",
    "confirm",
    "deferred_residual",
    "screen",
    "worst_kind",
    "worst_residual",
]

MAX_ROWS = 64
"""Suspect rows that one confirmation computes again, the worst first."""


# --- first stage ------------------------------------------------------------------------------------------------------


def screen(
    gemm: Gemm,
    expected: torch.Tensor,
    observed: torch.Tensor,
    dtype: torch.dtype,
    *,
    factor_scale: float = 1.0,
    finite_rows: bool = False,
) -> torch.Tensor:
    """Residual ÷ tolerance of every row of C, (m,) or (b, m), on its device; NaN where a sum is not finite.

    Args:
        gemm: the product, for its lengths.
        expected: E, (m, c) or (b, m, c), what the inputs say.
        observed: O, of the same shape, what C has.
        dtype: of C as it is stored.
        factor_scale: on the tolerance.
        finite_rows: one row that is not finite makes all ratios NaN, since the mean is in every tolerance; so asked
            (it waits for the device), the others have their own.

    `not (ratio <= 1)` is an alarm.
    """
    factor, grain = _tolerance(dtype, matmul_precision(gemm.left), gemm.k, gemm.n, expected.shape[-1], factor_scale)
    return residual_ratios(expected, observed, factor, grain=grain, finite_rows=finite_rows)


def worst_residual(expectation: Expectation, out: torch.Tensor, *, factor_scale: float = 1.0) -> float:
    """The largest ratio of `screen` for C = `out`, whose sums are taken here; waits for the device."""
    call, n = expectation.call, expectation.width
    weights = vectors(n, out)
    factor, grain = _tolerance(out.dtype, matmul_precision(call.left), call.k, n, weights.shape[1], factor_scale)
    worst = worst_ratio_of(
        expectation.oriented(out),
        weights,
        expectation.product,
        factor,
        grain=grain,
        alpha=call.alpha,
        addend=expectation.addend,
        beta=call.beta,
    )
    if worst is not None:
        return worst
    return float(residual_ratios(expectation.sums, expectation.observed(out), factor, grain=grain).max())


def deferred_residual(
    gemm: Gemm, expected: torch.Tensor, observed: torch.Tensor, dtype: torch.dtype, *, factor_scale: float = 1.0
) -> torch.Tensor:
    """(largest ratio of `screen`, whether a sum that the inputs give is not finite), (2,), without waiting for it."""
    factor, grain = _tolerance(dtype, matmul_precision(gemm.left), gemm.k, gemm.n, expected.shape[-1], factor_scale)
    return deferred_worst_ratio(expected, observed, factor, grain=grain)


@functools.lru_cache(maxsize=1024)
def _tolerance(dtype: torch.dtype, matmul: str, k: int, n: int, columns: int, scale: float) -> tuple[float, float]:
    """(factor on the scale of a row, what does not shrink with it)."""
    limits = torch.finfo(dtype)
    factor = screen_factor(precision_of(dtype, matmul), k=k, n=n, columns=columns)
    grain = screen_grain(limits.smallest_normal * limits.eps, n=n, columns=columns)
    return scale * factor, scale * grain


# --- second stage -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class Confirmation:
    """What the second stage found in the suspect rows."""

    kind: DetectionKind | None
    """Of the worst faulty element; None if every element is within round-off."""
    inputs_bad: bool
    """Whether the operands of these rows hold values that are not finite."""


def confirm(gemm: Gemm, out: torch.Tensor, ratio: torch.Tensor, *, tolerance_scale: float = 1.0) -> Confirmation:
    """Compute the suspect rows again in float64 and hold every element against its bound.

    Elements whose reference is not finite, because an operand is not or because the products exceed the range of the
    arithmetic, are no evidence about this operation.

    Args:
        gemm: the product.
        out: C.
        ratio: of `screen`, with finite rows apart from those that are not.
        tolerance_scale: on every bound.
    """
    addend = None if gemm.addend is None else gemm.addend.expand(out.shape)
    # Beside a mask the sums of a row say nothing.
    is_everything = addend is not None and bool(swallowing(addend).any())
    worst: DetectionKind | None = None
    inputs_bad = False
    for place in _in_parts(out) if is_everything else _suspects(ratio):
        left, right, stored = gemm.left[place].double(), gemm.right[place[:-1]].double(), out[place]
        added = None if addend is None else addend[place].double() * gemm.beta
        kind = _faulty(left * gemm.alpha, right, added, stored, tolerance_scale)
        worst = worst or kind
        inputs_bad = inputs_bad or not bool(left.isfinite().all() & right.isfinite().all())
        inputs_bad = inputs_bad or (added is not None and bool(added.isnan().any()))
    return Confirmation(worst, inputs_bad)


_Place = tuple[int | slice | torch.Tensor, ...]
"""(rows,), or (batch or batches, rows)."""

_AT_ONCE = 1 << 22
"""Elements of C that are computed again at once, at least those of one row or one matrix of a batch."""


def _in_parts(out: torch.Tensor) -> Iterator[_Place]:
    """All of C (m, n), or of b of them."""
    per_item = max(out[0].numel(), 1)
    num_items = max(1, _AT_ONCE // per_item)
    for first in range(0, len(out), num_items):
        items = slice(first, first + num_items)
        yield (items,) if out.dim() == 2 else (items, slice(None))


def _suspects(ratio: torch.Tensor) -> list[_Place]:
    """Rows over their tolerance, at most `MAX_ROWS` of them."""
    flat = torch.where(ratio.isnan(), torch.inf, ratio).flatten()
    chosen = torch.nonzero(~(flat <= 1.0)).flatten()
    if chosen.numel() > MAX_ROWS:
        chosen = torch.topk(flat, MAX_ROWS).indices
    if ratio.dim() == 1:
        return [(chosen,)]
    batches = chosen.div(ratio.shape[1], rounding_mode="floor")
    return [(batch, chosen[batches == batch] % ratio.shape[1]) for batch in sorted(set(batches.tolist()))]


def _faulty(
    left: torch.Tensor, right: torch.Tensor, addend: torch.Tensor | None, stored: torch.Tensor, tolerance_scale: float
) -> DetectionKind | None:
    """Kind of the worst element of `stored` (…, r, n) that round-off does not explain, or None. Operands in float64."""
    k = left.shape[-1]
    factors = element_factors(
        precision_of(stored.dtype, matmul_precision(stored)),
        k=k,
        smallest_normal=torch.finfo(stored.dtype).smallest_normal,
    )
    products = left.abs() @ right.abs()
    magnitude = products if addend is None else products + addend.abs()
    # Matrix units may take operands below the smallest normal number as zero.
    flushed = left.abs().sum(-1, keepdim=True) + right.abs().sum(-2, keepdim=True)
    roundoff = factors.accumulated * magnitude + factors.absolute * (1.0 + flushed)
    terms = _Terms(addend, stored, products, magnitude, factors.relative, tolerance_scale)
    kind = terms.worst(left @ right, roundoff)
    if kind is None or k <= LONG:
        return kind
    product, partial = _long_product(left, right)
    if addend is not None:
        partial = partial + addend.abs()
    return terms.worst(product, roundoff + factors.drift * partial)


@dataclasses.dataclass(frozen=True, slots=True)
class _Terms:
    """What the elements of some rows of C are held against, beside A·B; in float64, (…, r, n)."""

    addend: torch.Tensor | None
    stored: torch.Tensor
    """As it is."""
    products: torch.Tensor
    """Sums of the absolute products."""
    magnitude: torch.Tensor
    """The same, with the addend's."""
    relative: float
    tolerance_scale: float

    def worst(self, product: torch.Tensor, roundoff: torch.Tensor) -> DetectionKind | None:
        """Kind of the worst element that round-off does not explain, or None.

        Args:
            product: α·A·B.
            roundoff: what its terms leave, but for the rounding of the result.
        """
        stored, largest = self.stored.double(), torch.finfo(self.stored.dtype).max
        reference, size, swallowed = product, product.abs(), None
        if self.addend is not None:
            swallowed = self.addend.isinf() & product.isfinite()
            reference = product + self.addend
            size = size + self.addend.abs() + reference.abs()
        tolerance = (self.relative * size + roundoff) * self.tolerance_scale
        error = (stored - reference).abs()
        largest_sum = torch.finfo(torch.float64 if self.stored.dtype == torch.float64 else torch.float32).max
        overflowed = ~(reference.abs() + tolerance < largest) | ~(self.magnitude < largest_sum)
        same_infinity = stored == reference
        faulty = ~(error <= tolerance) & ~same_infinity & ~(overflowed & ~stored.isfinite()) & reference.isfinite()
        if swallowed is not None:
            # Beside an infinite addend a product that overflows is rightly no number.
            may_be_nan = stored.isnan() & ~(self.products < min(largest, largest_sum) / 2.0)
            faulty = faulty | (swallowed & ~same_infinity & ~may_be_nan)
        return worst_kind(self.stored, error, faulty)


_NUM_PARTS = 8
"""Of a long sum, after each of which its partial sum is looked at."""

_NUM_LANES = 64
"""Running sums of a dot product at most: vectors of 16 numbers, four at a time."""


def _long_product(left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(left·right, M of `thresholds.ElementFactors` without the addend).

    The product is the sum of its lanes: even of float64 it is more exact than what a library adds up in one piece.
    """
    zero = torch.zeros((), dtype=left.dtype, device=left.device)
    after = sizes = zero
    for one, other in zip(left.tensor_split(_NUM_PARTS, -1), right.tensor_split(_NUM_PARTS, -2), strict=True):
        before, after = after, after + one @ other
        sizes = sizes + torch.maximum(before.abs(), after.abs())
    total = sizes_of_lanes = zero
    for number in range(_NUM_LANES):
        lane = left[..., number::_NUM_LANES] @ right[..., number::_NUM_LANES, :]
        total, sizes_of_lanes = total + lane, sizes_of_lanes + lane.abs()
    return total, sizes / _NUM_PARTS + sizes_of_lanes / 2.0


def worst_kind(stored: torch.Tensor, error: torch.Tensor, faulty: torch.Tensor) -> DetectionKind | None:
    """Kind of the faulty element with the largest error, or None if none is faulty. All of one shape."""
    if not bool(faulty.any()):
        return None
    error = torch.where(faulty, torch.where(error.isnan(), torch.inf, error), -1.0)
    return classify(float(stored.flatten()[error.argmax()]), torch.finfo(stored.dtype).max)
