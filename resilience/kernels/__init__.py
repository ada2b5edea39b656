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

    A library GEMM with few columns is many times cheaper than `sum(-1, dtype=float32)`. On a CPU it is fastest with
    the matrix read along its memory: as the plain product for bfloat16 by rows, as the transposed product for bfloat16
    by columns and for float32.
    """
    if matrix.dim() == 2:
        product = torch.mm
    elif weights.dim() == 3:
        product = torch.bmm
    elif matrix.is_contiguous():
        num_matrices, num_rows, num_columns = matrix.shape
        return weighted_row_sums(matrix.view(-1, num_columns), weights).view(num_matrices, num_rows, -1)
    else:
        product, weights = torch.bmm, weights.expand(matrix.shape[0], -1, -1)
    if matrix.is_cuda or (matrix.dtype == torch.bfloat16 and matrix.stride(-1) == 1):
        return product(matrix, weights)
    return product(weights.mT, matrix.mT).mT
