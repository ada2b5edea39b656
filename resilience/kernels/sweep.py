"""One pass over a matrix that gives all its weighted row and column sums in float32.

The checks are bound by memory, so each tensor is read once. On a CPU a compiled kernel does it (`_sweep.c`); where that
was not built, for other devices and for strides that it does not know, products of torch do, with the same results
within round-off. No state, no thresholds, no gradients.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

__all__ = ["MAX_COLUMNS", "Sweep", "is_compiled", "sweep"]

MAX_COLUMNS = 8
"""Weight vectors a side that one sweep takes."""

_DTYPES = (torch.float32, torch.bfloat16)


class Sweep(NamedTuple):
    """Sums of one matrix. Every column of them is contiguous in memory, as the next sweep likes its weights."""

    rows: torch.Tensor | None
    """matrix · right, (m, c) or (b, m, c), float32."""
    columns: torch.Tensor | None
    """matrixᵀ · left, (n, c') or (b, n, c'), float32."""


def is_compiled() -> bool:
    """Whether the compiled kernel is in use for CPU tensors."""
    return False


def sweep(matrix: torch.Tensor, right: torch.Tensor | None = None, left: torch.Tensor | None = None) -> Sweep:
    """Sums of the rows of `matrix` under each column of `right`, and of its columns under each column of `left`.

    Args:
        matrix: (m, n) or (b, m, n), float32 or bfloat16, of any strides.
        right: (n, c), or (b, n, c) for one set a matrix; float32, c ≤ 8.
        left: (m, c'), or (b, m, c') for one set a matrix; float32, c' ≤ 8.

    Returns:
        The sums in float32, of products and partial sums in float32; NaN and INF propagate. No gradient flows.
    """
    assert matrix.dtype in _DTYPES, matrix.dtype
    assert matrix.dim() in (2, 3), matrix.shape
    with torch.no_grad():
        rows = None if right is None else _products(matrix, right)
        columns = None if left is None else _products(matrix.mT, left)
    return Sweep(rows, columns)


def _products(matrix: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """matrix · weights by library products, transposed: so they are several times faster on a CPU."""
    assert weights.dtype == torch.float32, weights.dtype
    assert weights.shape[-2] == matrix.shape[-1], (matrix.shape, weights.shape)
    assert weights.shape[-1] <= MAX_COLUMNS, weights.shape
    # A lower precision that the user allows for products is not meant for the sums that check them.
    exact = torch.get_float32_matmul_precision() == "highest"
    wide = torch.float32 if exact else torch.float64
    matrix, weights = matrix.to(wide), weights.to(wide)
    if matrix.dim() == 2:
        return torch.mm(weights.mT, matrix.mT).mT.float()
    if weights.dim() == 3:
        return torch.bmm(weights.mT, matrix.mT).mT.float()
    if matrix.is_contiguous():
        num_matrices, num_rows, num_columns = matrix.shape
        sums = torch.mm(weights.mT, matrix.view(-1, num_columns).mT)
        return sums.view(-1, num_matrices, num_rows).permute(1, 2, 0).float()
    return torch.bmm(weights.mT.expand(matrix.shape[0], -1, -1), matrix.mT).mT.float()
