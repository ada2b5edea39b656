"""One pass over a matrix that gives all its weighted row and column sums in float32.

The checks are bound by memory, so each tensor is read once. On a CPU a compiled kernel does it (`_sweep.c`), on a CUDA
device one in Triton (`checksum/`); where that was not built or installed, and for strides that it does not know,
products of torch do, with the same results within round-off. No thresholds, no sites, no steps, no gradients.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from resilience.kernels import launch
from resilience.kernels.precision import float32_precision
from resilience.kernels.threads import gomp_parallel

try:
    from resilience.kernels import _sweep as _compiled
except ImportError:  # built without a C compiler
    _compiled = None  # type: ignore[assignment]

__all__ = ["MAX_COLUMNS", "Sweep", "describe", "is_compiled", "sweep"]

MAX_COLUMNS = 8
"""Weight vectors a side that one sweep takes."""

_GOMP_PARALLEL = gomp_parallel() if _compiled is not None else 0
_DTYPES = (torch.float32, torch.bfloat16)


class Sweep(NamedTuple):
    """Sums of one matrix. Every column of them is contiguous in memory, as the next sweep likes its weights."""

    rows: torch.Tensor | None
    """matrix · right, (m, c) or (b, m, c), float32."""
    columns: torch.Tensor | None
    """matrixᵀ · left, (n, c') or (b, n, c'), float32."""


def is_compiled() -> bool:
    """Whether the compiled kernel is in use for CPU tensors."""
    return _compiled is not None


def describe() -> str:
    """How sums are taken on this machine's CPU, in words."""
    if _compiled is None:
        return "not compiled, by products of torch"
    threads = "torch's threads" if _GOMP_PARALLEL else "one thread"
    return f"compiled, {_compiled.instructions()} instructions, {threads}"


def sweep(
    matrix: torch.Tensor,
    right: torch.Tensor | None = None,
    left: torch.Tensor | None = None,
    *,
    into: Sweep | None = None,
) -> Sweep:
    """Sums of the rows of `matrix` under each column of `right`, and of its columns under each column of `left`.

    Args:
        matrix: (m, n) or (b, m, n), float32, bfloat16 or float16, of any strides; fastest if its rows or its columns
            lie contiguous.
        right: (n, c), or (b, n, c) for one set a matrix; float32, c ≤ 8.
        left: (m, c'), or (b, m, c') for one set a matrix; float32, c' ≤ 8.
        into: an earlier result for a single matrix of the same shape, whose memory may be used again.

    Returns:
        The sums in float32, of products and partial sums in float32; NaN and INF propagate. No gradient flows. The
        compiled kernel's bits depend on shapes, strides and the processor's instruction set, not on the number of
        threads.
    """
    if _compiled is not None:
        rows, columns = (None, None) if into is None else into
        found = _compiled.sweep(
            _settled(matrix),
            None if right is None else _settled(right),
            None if left is None else _settled(left),
            rows,
            columns,
            _GOMP_PARALLEL,
            torch.get_num_threads(),
        )
        if found is not None:
            return Sweep(*found)
    sums = launch("checksum.sweep", matrix, lambda kernels: kernels.sweep(matrix.resolve_neg(), right, left))
    if sums is not None:
        return Sweep(sums.rows, sums.columns)
    assert matrix.dtype in (*_DTYPES, torch.float16), matrix.dtype
    assert matrix.dim() in (2, 3), matrix.shape
    # Autocast would round what is multiplied.
    with torch.no_grad(), torch.autocast(matrix.device.type, enabled=False):
        return Sweep(
            None if right is None else _products(matrix, right),
            None if left is None else _products(matrix.mT, left),
        )


def _settled(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` with its elements in memory as they are: a lazily negated one is not."""
    return tensor.resolve_neg() if tensor.is_neg() else tensor


def _products(matrix: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """matrix · weights by library products, transposed: so they are several times faster on a CPU."""
    assert weights.dtype == torch.float32, weights.dtype
    assert weights.shape[-2] == matrix.shape[-1], (matrix.shape, weights.shape)
    assert weights.shape[-1] <= MAX_COLUMNS, weights.shape
    # A lower precision that the user allows for products is not meant for the sums that check them.
    wide = torch.float32 if float32_precision(matrix.device.type) == "ieee" else torch.float64
    matrix, weights = matrix.to(wide), weights.to(wide)
    if matrix.dim() == 2:
        return torch.mm(weights.mT, matrix.mT).mT.float()
    if weights.dim() == 3:
        return torch.bmm(weights.mT, matrix.mT).mT.float()
    if matrix.is_contiguous():
        num_matrices, num_rows, num_columns = matrix.shape
        sums = torch.mm(weights.mT, matrix.view(-1, num_columns).mT)
        return sums.view(weights.shape[1], num_matrices, num_rows).permute(1, 2, 0).float()
    return torch.bmm(weights.mT.expand(matrix.shape[0], -1, -1), matrix.mT).mT.float()
