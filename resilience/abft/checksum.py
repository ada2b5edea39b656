"""Checksums of one GEMM in torch: the screen of every call, and the confirmation of suspect rows.

The arithmetic that `thresholds.py` describes. No state but the checksum vectors, no sites, no decisions about mending.
Shapes: m×k by k×n, or b of them; c checksum columns.
"""

from __future__ import annotations

import dataclasses
import functools

import torch

from resilience.abft.gemm import Gemm
from resilience.abft.thresholds import Precision, classify, element_factors, screen_factor
from resilience.events import DetectionKind
from resilience.kernels import weighted_row_sums

__all__ = [
    "MAX_ROWS",
    "Confirmation",
    "WeightSums",
    "confirm",
    "deferred_result",
    "operand_roundoff",
    "screen",
    "worst_kind",
]

MAX_ROWS = 64
"""Suspect rows that one confirmation computes again, the worst first."""

_TINY = 1e-36
"""Added to squares of tolerances: keeps 0 ÷ 0 out of the ratio of an empty row. Sums below 1e-18 count as nothing."""

_GOLDEN = (5.0**0.5 - 1.0) / 2.0
"""Multiples of it, modulo 1, are spread evenly and never repeat."""


# --- checksum vectors -------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=256)
def _vectors(n: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """V, (n, c): plain and position-weighted sums, each with fixed pseudo-random signs.

    float32 and float64 have one column of each. bfloat16 has two of each, every one over half of the elements,
    dealt out differently for the plain and for the weighted ones: shorter sums lose less to the rounding of their own
    result, and a library GEMM with 8 columns costs what one with 1 costs. Entries for bfloat16 have 8 bits, so their
    products are exact in float32. Two elements that swap places differ in sign, in column or in weight in at least one
    of the sums.
    """
    position = torch.arange(n, dtype=torch.int64)
    mixed = (position * 0x9E3779B1) & 0xFFFFFFFF
    mixed = ((mixed ^ (mixed >> 15)) * 0x85EBCA77) & 0xFFFFFFFF
    signs, other_signs = (((mixed >> bit) & 1) * 2.0 - 1.0 for bit in (13, 19))
    if dtype == torch.bfloat16:
        weights = 1.0 + ((position // 4) * _GOLDEN % 1.0 * 128.0).floor() / 128.0
        columns = torch.zeros(n, 4, dtype=torch.float64)
        columns[position, position % 2] = signs.double()
        columns[position, 2 + (position // 2) % 2] = other_signs * weights.double()
    else:
        # Transposed in memory, as `weighted_row_sums` likes it for float32.
        columns = torch.stack([signs.double(), other_signs * (1.0 + position.double() * _GOLDEN % 1.0)]).mT
    return columns.to(device=device, dtype=torch.float32 if dtype == torch.float16 else dtype)


@functools.lru_cache(maxsize=16)
def _ones(n: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.ones(n, dtype=dtype, device=device)


class WeightSums:
    """B·V and D·V for operands that are module parameters, taken once per optimizer step.

    The key is the parameter's identity, memory and version counter, never a reference to it: a gathered ZeRO-3
    parameter is not kept alive. A stale entry cannot hide a fault: it makes the screen raise a false alarm, which the
    confirmation (it reads the parameter itself) dismisses, and the entry is dropped.
    """

    def __init__(self) -> None:
        self._sums: dict[tuple[object, ...], torch.Tensor] = {}

    def clear(self) -> None:
        self._sums.clear()

    def discard(self, operand: torch.Tensor) -> None:
        """Forget the sums of `operand`."""
        self._sums.pop(self._key("right", operand), None)
        self._sums.pop(self._key("addend", operand), None)

    def get(self, right: torch.Tensor, *, exact: bool = False) -> torch.Tensor:
        """Sums of `right`, ready to be multiplied from the left; see `_right_sums`."""
        if not _is_parameter(right):
            return _right_sums(right, exact=exact)
        key = self._key("right", right)
        sums = self._sums.get(key)
        if sums is None:
            sums = self._sums[key] = _right_sums(right, exact=exact)
        return sums

    def of_addend(self, addend: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Sums of `addend`, expanded to the width of `out`; see `_addend_sums`."""
        if not _is_parameter(addend) or addend.shape[-1:] != out.shape[-1:]:
            return _addend_sums(addend, out)
        key = self._key("addend", addend)
        sums = self._sums.get(key)
        if sums is None:
            sums = self._sums[key] = _addend_sums(addend, out)
        return sums

    @staticmethod
    def _key(role: str, operand: torch.Tensor) -> tuple[object, ...]:
        # ZeRO-3 gathers one parameter after the other into the same memory, so the address alone tells too little.
        parameter = operand if operand._base is None else operand._base
        version = None if operand.is_inference() else operand._version
        place = operand.data_ptr(), operand.shape, operand.stride(), operand.dtype, operand.device
        return role, id(parameter), version, *place


def _is_parameter(operand: torch.Tensor) -> bool:
    base = operand._base
    return isinstance(operand if base is None else base, torch.nn.Parameter)


def _right_sums(right: torch.Tensor, *, exact: bool) -> torch.Tensor:
    """B·V. For bfloat16 and `exact`, its high and low parts side by side, 2·c columns that together hold 16 bits."""
    vectors = _vectors(right.shape[-1], right.dtype, right.device)
    if right.dtype == torch.float16:
        return weighted_row_sums(right.float(), vectors)
    if right.dtype != torch.bfloat16 or not exact:
        return weighted_row_sums(right, vectors)
    # In the layout that the product in float32 is several times faster with.
    sums = weighted_row_sums(right.float(), vectors.mT.float().contiguous().mT)
    # They lie transposed, and are joined so: side by side in memory would be an order of magnitude slower.
    sums = sums.mT
    high = sums.bfloat16()
    return torch.cat([high, (sums - high).bfloat16()], dim=-2).mT


# --- first stage ------------------------------------------------------------------------------------------------------


def screen(
    gemm: Gemm, out: torch.Tensor, sums: WeightSums, *, factor_scale: float = 1.0, finite_rows: bool = False
) -> torch.Tensor:
    """Residual ÷ tolerance of every row of `out`, (m,) or (b, m), on its device; NaN where a sum is not finite.

    `not (ratio <= 1)` is an alarm. Reads A, C and, unless cached, B once. One row that is not finite makes all ratios
    NaN, since the mean is in every tolerance; with `finite_rows` (it waits for the device) the others have their own.
    """
    expected = _expected_sums(gemm, out, sums)
    factor = factor_scale * _screen_factor(out.dtype, _matmul_precision(out.dtype), gemm.k, gemm.n, expected.shape[-1])
    scale = _energy(expected)
    usual = scale[scale.isfinite()].mean() if finite_rows else scale.mean()
    tolerance = scale.add_(usual).mul_(factor * factor).add_(_TINY)
    # The observed sums of bfloat16 are widened on the way.
    return _energy(expected.sub_(_observed_sums(out))).div_(tolerance).sqrt_()


@functools.lru_cache(maxsize=1024)
def _screen_factor(dtype: torch.dtype, matmul_precision: str, k: int, n: int, columns: int) -> float:
    return screen_factor(_precision(dtype, matmul_precision), k=k, n=n, columns=columns)


def _energy(sums: torch.Tensor) -> torch.Tensor:
    """Sum of squares of every row of (…, c). A reduction over few columns is slow unless they lie transposed."""
    squares = sums * sums
    if squares.dim() == 2:
        return torch.mv(squares, _ones(squares.shape[1], squares.dtype, squares.device))
    if squares.stride(-1) != 1:
        return squares.mT.sum(-2)
    return squares @ _ones(squares.shape[-1], squares.dtype, squares.device)


def _expected_sums(gemm: Gemm, out: torch.Tensor, sums: WeightSums) -> torch.Tensor:
    """E = alpha·A·(B·V) + beta·D·V, (m, c) or (b, m, c) in float32 (float64 for float64); the caller's to change."""
    right = sums.get(gemm.right, exact=gemm.cancels)
    left = gemm.left.float() if gemm.left.dtype == torch.float16 else gemm.left
    expected = weighted_row_sums(left, right)
    if expected.dtype == torch.bfloat16:
        expected = expected.float()
        if expected.shape[-1] == 8:
            expected = expected[..., :4] + expected[..., 4:]
    if gemm.alpha != 1.0:
        expected.mul_(gemm.alpha)
    if gemm.addend is not None:
        expected.add_(sums.of_addend(gemm.addend, out), alpha=gemm.beta)
    return expected


def _addend_sums(addend: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """D·V with D expanded to C's shape, in float32 (float64 for float64)."""
    wide = torch.float64 if out.dtype == torch.float64 else torch.float32
    vectors = _vectors(out.shape[-1], out.dtype, out.device).to(wide)
    addend = addend.to(wide)
    if addend.dim() == 0 or addend.shape[-1] != out.shape[-1]:
        addend = addend.expand(*addend.shape[:-1], out.shape[-1])
    return addend @ vectors


def _observed_sums(out: torch.Tensor) -> torch.Tensor:
    """O = C·V, in float32 for float16, else in the dtype of C."""
    vectors = _vectors(out.shape[-1], out.dtype, out.device)
    return weighted_row_sums(out.float() if out.dtype == torch.float16 else out, vectors)


def _matmul_precision(dtype: torch.dtype) -> str:
    return torch.get_float32_matmul_precision() if dtype == torch.float32 else "highest"


@functools.cache
def _precision(dtype: torch.dtype, matmul_precision: str) -> Precision:
    stored = torch.finfo(dtype).eps / 2
    wide = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps / 2
    return Precision(
        stored=stored,
        accumulated=wide,
        checked=stored if dtype == torch.bfloat16 else wide,
        operand=operand_roundoff(matmul_precision),
    )


def operand_roundoff(matmul_precision: str) -> float:
    """Unit round-off of float32 operands under `torch.set_float32_matmul_precision`."""
    return {"highest": 0.0, "high": 2.0**-11, "medium": 2.0**-8}[matmul_precision]


# --- second stage -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class Confirmation:
    """What the second stage found in the suspect rows."""

    kind: DetectionKind | None
    """Of the worst faulty element; None if every element is within round-off."""
    inputs_bad: bool
    """Whether the operands of these rows hold values that are not finite."""


def deferred_result(gemm: Gemm, ratio: torch.Tensor) -> torch.Tensor:
    """(worst ratio, whether an operand has values that are not finite), shape (2,), without waiting for the device."""
    finite = gemm.left.isfinite().all() & gemm.right.isfinite().all()
    return torch.stack([ratio.max().float(), (~finite).float()])


def confirm(gemm: Gemm, out: torch.Tensor, ratio: torch.Tensor, *, tolerance_scale: float = 1.0) -> Confirmation:
    """Compute the suspect rows again in float64 and hold every element against its bound.

    Elements whose reference is not finite, because an operand is not or because the products exceed the range of the
    arithmetic, are no evidence about this operation.
    """
    if bool(ratio.isnan().any()):
        ratio = screen(gemm, out, WeightSums(), factor_scale=tolerance_scale, finite_rows=True)
    addend = None if gemm.addend is None else gemm.addend.expand(out.shape)
    worst: DetectionKind | None = None
    inputs_bad = False
    for batch, rows in _suspects(ratio, everything=addend is not None and not bool(addend.isfinite().all())):
        left, right, stored = gemm.left, gemm.right, out
        added = addend
        if batch is not None:
            left, right, stored = left[batch], right[batch], stored[batch]
            added = None if added is None else added[batch]
        left, stored = left[rows].double(), stored[rows]
        added = None if added is None else added[rows].double() * gemm.beta
        kind = _faulty(left * gemm.alpha, right.double(), added, stored, tolerance_scale)
        worst = worst or kind
        inputs_bad = inputs_bad or not bool(left.isfinite().all() & right.isfinite().all())
        inputs_bad = inputs_bad or (added is not None and bool(added.isnan().any()))
    return Confirmation(worst, inputs_bad)


def _suspects(ratio: torch.Tensor, *, everything: bool) -> list[tuple[int | None, torch.Tensor]]:
    """(batch, rows) of the rows over their tolerance, at most `MAX_ROWS` of them unless `everything` is suspect."""
    flat = torch.where(ratio.isnan(), torch.inf, ratio).flatten()
    if everything:
        chosen = torch.arange(flat.numel())
    else:
        chosen = torch.nonzero(~(flat <= 1.0)).flatten()
        if chosen.numel() > MAX_ROWS:
            chosen = torch.topk(flat, MAX_ROWS).indices
    if ratio.dim() == 1:
        return [(None, chosen)]
    batches = chosen.div(ratio.shape[1], rounding_mode="floor")
    return [(batch, chosen[batches == batch] % ratio.shape[1]) for batch in sorted(set(batches.tolist()))]


def _faulty(
    left: torch.Tensor, right: torch.Tensor, addend: torch.Tensor | None, stored: torch.Tensor, tolerance_scale: float
) -> DetectionKind | None:
    """Kind of the worst element of `stored` (r, n) that round-off does not explain, or None. Operands in float64."""
    limits = torch.finfo(stored.dtype)
    factors = element_factors(
        _precision(stored.dtype, _matmul_precision(stored.dtype)),
        k=left.shape[1],
        smallest_normal=limits.smallest_normal,
    )
    reference = left @ right
    magnitude = left.abs() @ right.abs()
    # Matrix units may take operands below the smallest normal number as zero.
    flushed = left.abs().sum(1, keepdim=True) + right.abs().sum(0, keepdim=True)
    size = reference.abs()
    if addend is not None:
        size = size + addend.abs()
        magnitude = magnitude + addend.abs()
        reference = reference + addend
        size = size + reference.abs()
    tolerance = (
        factors.relative * size + factors.accumulated * magnitude + factors.absolute * (1.0 + flushed)
    ) * tolerance_scale
    error = (stored.double() - reference).abs()
    largest_sum = torch.finfo(torch.float64 if stored.dtype == torch.float64 else torch.float32).max
    overflowed = ~(reference.abs() + tolerance < limits.max) | ~(magnitude < largest_sum)
    same_infinity = stored.double() == reference
    faulty = ~(error <= tolerance) & ~same_infinity & ~(overflowed & ~stored.isfinite()) & reference.isfinite()
    return worst_kind(stored, error, faulty)


def worst_kind(stored: torch.Tensor, error: torch.Tensor, faulty: torch.Tensor) -> DetectionKind | None:
    """Kind of the faulty element with the largest error, or None if none is faulty. All of one shape."""
    if not bool(faulty.any()):
        return None
    error = torch.where(faulty, torch.where(error.isnan(), torch.inf, error), -1.0)
    return classify(float(stored.flatten()[error.argmax()]), torch.finfo(stored.dtype).max)
