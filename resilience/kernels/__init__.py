"""Numerical primitives of the checks, in the form that is fastest where the tensors live.

Plain functions of tensors: no state, no thresholds, no knowledge of sites or steps. Each has its arithmetic in torch
here; a device-specific kernel is chosen in this file and nowhere else.
"""

from __future__ import annotations

import torch

__all__ = ["weighted_row_sums"]


def weighted_row_sums(matrix: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Row sums of `matrix` under each column of `weights`.

    Args:
        matrix: (m, n) or (b, m, n), of any strides.
        weights: (n, c), or (b, n, c) for one set a matrix; of the matrix's dtype.

    Returns:
        (m, c) or (b, m, c), accumulated in float32 (float64 for float64), rounded once to the dtype.

    A library GEMM with few columns is many times cheaper than `sum(-1, dtype=float32)`. For float32 on a CPU the
    transposed product with its long side contiguous is about twice as fast again; for bfloat16 the plain one is.
    """
    if matrix.dim() == 3 and weights.dim() == 2:
        if matrix.is_contiguous():
            flat = matrix.view(-1, matrix.shape[2])
            return weighted_row_sums(flat, weights).view(*matrix.shape[:2], -1)
        weights = weights.expand(matrix.shape[0], -1, -1)
    product = torch.mm if matrix.dim() == 2 else torch.bmm
    if matrix.dtype == torch.bfloat16 or matrix.is_cuda:
        return product(matrix, weights)
    return product(weights.mT, matrix.mT).mT
