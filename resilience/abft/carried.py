"""Checksums that are carried through products: sums of a matrix that follow from the matrices it was made of.

A *line* is a row or a column; a matrix of L lines has carried sums (L, c), one for each column of `line_weights`. Here
is how they are taken, how a product and a bias carry them on, and how large their round-off may be.
Never here: a comparison with what a matrix holds (`eec`), or which matrices make up an attention (`sections`).

Round-off is carried as a variance, beside the sums, from inputs alone: a fault in a product cannot widen the tolerance
that it is held against. Sums are in float64 unless float32 is asked for.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import torch

from resilience.abft.arithmetic import matmul_precision, precision_of
from resilience.abft.gemm import Gemm
from resilience.abft.thresholds import carried_variance_factors

__all__ = ["NUM_SIGNS", "Carried", "Encoded", "encode", "encode_gemm", "line_weights", "product"]

NUM_SIGNS = 16
"""Columns of pseudo-random signs beside the two of ATTNChecker."""

_TINY = 1e-300


@functools.lru_cache(maxsize=64)
def line_weights(n: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """(n, 2 + NUM_SIGNS): ones, i + 1, and columns of fixed pseudo-random signs.

    The first two locate one wrong element (ATTNChecker's EEC-ABFT). They cannot tell two wrong elements from one: equal
    errors at 2 and 4 look like one twice as large at 3. The signs can; and Σ over them of squared sums ÷ NUM_SIGNS
    estimates the sum of squares of a line (a Rademacher sketch).
    """
    position = torch.arange(n, dtype=torch.int64, device="cpu")
    mixed = (position + 1) * 0x9E3779B1 & 0xFFFFFFFF
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        mixed = ((mixed ^ (mixed >> shift)) * factor) & 0xFFFFFFFF
    signs = ((mixed.unsqueeze(1) >> torch.arange(8, 8 + NUM_SIGNS, device="cpu")) & 1) * 2 - 1
    columns = [torch.ones_like(position).unsqueeze(1), (position + 1).unsqueeze(1), signs]
    return torch.cat(columns, dim=1).to(device=device, dtype=dtype)


@dataclasses.dataclass(frozen=True, slots=True)
class Carried:
    """What the sums of the lines of one matrix must be."""

    sums: torch.Tensor
    """(…, L, c) in float64 or float32, one column for each of `line_weights`."""
    variance: torch.Tensor
    """(…, L): of carried − observed sum under signs, by round-off in a clean run."""
    coherent: torch.Tensor
    """(…, L): what the plain sum may be off by beyond that, since the roundings of equal elements are equal and add up;
    under weights i + 1 n times as much."""

    @classmethod
    def of_bias(cls, bias: torch.Tensor, num_rows: int, sums: torch.dtype) -> tuple[Carried, Carried]:
        """(rows, columns) of the matrices (…, num_rows, n) each of whose rows is the bias (…, n)."""
        bias = bias.to(sums)
        across, down = (line_weights(n, sums, bias.device) for n in (bias.shape[-1], num_rows))
        rows = (bias @ across).unsqueeze(-2)
        columns = bias.unsqueeze(-1) * down.sum(0)
        return cls.exact(rows), cls.exact(columns)

    @classmethod
    def exact(cls, sums: torch.Tensor) -> Carried:
        """Sums that no stored matrix lies behind."""
        nothing = torch.zeros_like(sums[..., 0])
        return cls(sums, nothing, nothing)

    @property
    def energy(self) -> torch.Tensor:
        """(…, L): estimated sum of squares of each line."""
        return self.sums[..., 2:].square().mean(-1)

    def mapped(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Carried:
        """With `change`, which concerns the dimensions before the lines, made to every tensor."""
        return Carried(change(self.sums), change(self.variance), change(self.coherent))

    def of_batch(self, batch: torch.Size) -> Carried:
        """Expanded to the matrices of this batch."""
        lines = self.variance.shape[-1]
        return Carried(
            self.sums.expand(*batch, lines, -1),
            self.variance.expand(*batch, lines),
            self.coherent.expand(*batch, lines),
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Encoded:
    """A matrix (…, m, n) with the sums of its rows and of its columns as its inputs say that they must be."""

    value: torch.Tensor
    rows: Carried | None = None
    """Over m lines."""
    columns: Carried | None = None
    """Over n lines."""

    @property
    def mT(self) -> Encoded:
        """The transposed matrix."""
        return Encoded(self.value.mT, self.columns, self.rows)


def encode(
    value: torch.Tensor, *, sums: torch.dtype = torch.float64, rows: bool = True, columns: bool = True
) -> Encoded:
    """Take the sums of a matrix that is trusted: the input of a section, a weight.

    Args:
        value: (…, m, n), any float dtype.
        sums: dtype of the sums.
        rows: whether the sums of the rows are wanted.
        columns: whether the sums of the columns are wanted.
    """
    return Encoded(value, _fresh(value, sums) if rows else None, _fresh(value.mT, sums) if columns else None)


def _fresh(lines: torch.Tensor, wide: torch.dtype) -> Carried:
    n = lines.shape[-1]
    sums = lines.to(wide) @ line_weights(n, wide, lines.device)
    energy = sums.square().mean(-1)
    return Carried(sums, energy * (torch.finfo(wide).eps * (math.sqrt(n) + 4.0)) ** 2, torch.zeros_like(energy))


def product(
    left: Encoded, right: Encoded, value: torch.Tensor, *, alpha: float = 1.0, addend: Encoded | None = None
) -> Encoded:
    """Carry sums through value = alpha·left·right + addend, computed by whomever; the result is not looked at.

    The rows follow from the rows of `right`, the columns from the columns of `left`; a side that is not known stays
    unknown. Shapes: left (…, m, k), right (…, k, n), value and addend (…, m, n), batch dimensions equal or broadcast.
    """
    rows = columns = None
    m, n = value.shape[-2:]
    if right.rows is not None:
        rows = _through(left.value, right.rows, value, n, alpha, None if addend is None else addend.rows)
    if left.columns is not None:
        below = None if addend is None else addend.columns
        columns = _through(right.value.mT, left.columns, value, m, alpha, below)
    return Encoded(value, rows, columns)


def _through(
    near: torch.Tensor, far: Carried, value: torch.Tensor, n: int, alpha: float, addend: Carried | None
) -> Carried:
    """Sums of the lines of near·Far (…, L, n) from those of Far: near (…, L, k), far over k lines; of `value` dtype and
    device only.
    """
    stored, wide = value.dtype, far.sums.dtype
    k = near.shape[-1]
    precision = precision_of(stored, matmul_precision(value), wide)
    factors = carried_variance_factors(precision, k=k, n=n, num_roundings=1 if addend is None else 2)
    near = near.to(wide) * alpha
    sums = near @ far.sums
    squares = near.square()
    variance = (squares @ far.variance.unsqueeze(-1)).squeeze(-1)
    coherent = (near.abs() @ far.coherent.unsqueeze(-1)).squeeze(-1)
    # The Frobenius norm of Far by its carried sums: a fault in Far itself does not count.
    size = squares.sum(-1) * far.energy.sum(-1, keepdim=True)
    reach = squares.sum(-1) * far.sums[..., 0].square().sum(-1, keepdim=True)
    if addend is not None:
        sums = sums + addend.sums
        variance, coherent = variance + addend.variance, coherent + addend.coherent
        size = size + addend.energy
    energy = sums[..., 2:].square().mean(-1)
    # A line's own estimate may be too small by chance, that of the usual line never is; a median ignores a faulty one.
    energy = energy + _median(energy)
    limits = torch.finfo(stored)
    spacing = max(limits.smallest_normal * (limits.eps if stored == torch.float16 else 1.0), _TINY)
    variance = variance + factors.stored * energy + factors.accumulated * size + n * spacing**2
    variance = variance + factors.summed * (reach + sums[..., 0].square() + energy)
    largest = (3.0 * factors.stored * energy).sqrt() + (factors.accumulated * size).sqrt()
    return Carried(sums, variance, coherent + math.sqrt(n) * largest)


def _median(energy: torch.Tensor) -> torch.Tensor:
    """The lower median of what is finite in the last dimension, kept; 0 without any. `nanmedian` is refused on a GPU
    under deterministic algorithms.
    """
    finite = energy.isfinite()
    middle = (finite.sum(-1, keepdim=True) - 1).clamp(min=0) // 2
    ordered = torch.where(finite, energy, torch.inf).sort(-1).values
    return ordered.gather(-1, middle).nan_to_num(posinf=0.0)


def encode_gemm(gemm: Gemm, out: torch.Tensor, *, sums: torch.dtype = torch.float64) -> Encoded:
    """Sums of the rows and of the columns of one GEMM's result, from its operands as they are now.

    Costs four passes in float64 over operands and result: for a GEMM that is suspect, or (before it runs) for one that
    will overwrite what it reads. `out` gives shape and dtype only.
    """
    addend = None
    if gemm.addend is not None:
        addend = encode(gemm.addend.to(sums).expand(out.shape) * gemm.beta, sums=sums)
    left = encode(gemm.left, sums=sums, rows=False)
    right = encode(gemm.right, sums=sums, columns=False)
    return product(left, right, out, alpha=gemm.alpha, addend=addend)
