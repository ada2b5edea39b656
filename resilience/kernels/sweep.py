"""One pass over a matrix that gives all its weighted row and column sums in float32.

The checks are bound by memory, so each tensor is read once. On a CPU a compiled kernel does it (`_sweep.c`), on a CUDA
device one in Triton (`checksum/`); where that was not built or installed, and for strides that it does not know,
products of torch do, with the same results within round-off. No thresholds, no sites, no steps, no gradients.
"""

from __future__ import annotations

import threading
from typing import NamedTuple

import torch

from resilience.kernels import triton_kernels
from resilience.kernels.precision import float32_precision
from resilience.kernels.threads import gomp_parallel

try:
    from resilience.kernels import _sweep as _compiled
except ImportError:  # built without a C compiler
    _compiled = None  # type: ignore[assignment]

__all__ = ["MAX_COLUMNS", "Sweep", "describe", "is_compiled", "row_sums_at", "sweep"]

MAX_COLUMNS = 8
"""Weight vectors a side that one sweep takes."""

_GOMP_PARALLEL = gomp_parallel() if _compiled is not None else 0
_DTYPES = (torch.float32, torch.bfloat16)
_Weights = tuple[int, tuple[int, ...], tuple[int, ...]]
"""Address, shape and strides."""
_NONE: _Weights = (0, (), ())
"""Of weights that are not there."""


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
        into: an earlier result for the same shapes, whose memory may be used again.

    Returns:
        The sums in float32, of products and partial sums in float32; NaN and INF propagate. No gradient flows. The
        compiled kernel's bits depend on shapes, strides and the processor's instruction set, not on the number of
        threads.
    """
    if _compiled is not None and matrix.is_cpu:
        swept = _swept(matrix, right, left, into)
        if swept is not None:
            return swept
    kernels = triton_kernels("checksum.sweep", matrix)
    if kernels is not None:
        sums = kernels.sweep(matrix.resolve_neg(), right, left)
        return Sweep(sums.rows, sums.columns)
    assert matrix.dtype in (*_DTYPES, torch.float16), matrix.dtype
    assert matrix.dim() in (2, 3), matrix.shape
    # Autocast would round what is multiplied.
    with torch.no_grad(), torch.autocast(matrix.device.type, enabled=False):
        rows = None if right is None else _products(matrix, right)
        columns = None if left is None else _products(matrix.mT, left)
    return Sweep(rows, columns)


def row_sums_at(matrix: torch.Tensor, right: torch.Tensor) -> int:
    """Address of matrix · right, as `sweep` gives it, in memory that this thread's next call overwrites; 0 where the
    compiled kernel does not take them. Every product's result is swept once: a fresh tensor each costs more than the
    sums of a small one.
    """
    if _compiled is None or not matrix.is_cpu:
        return 0
    weights = _weights(right)
    if weights is None:
        return 0
    shape = matrix.shape
    address = _scratch.address((shape[0] if len(shape) == 3 else 1) * shape[-2] * right.shape[-1])
    return address if _run(matrix, weights, _NONE, address, 0) else 0


class _Scratch(threading.local):
    memory = torch.empty(0, device="cpu")
    start = 0

    def address(self, count: int) -> int:
        """Of room for `count` numbers in float32."""
        if count > self.memory.numel():
            self.memory = torch.empty(count, dtype=torch.float32, device="cpu")
            self.start = self.memory.data_ptr()
        return self.start


_scratch = _Scratch()


def _swept(
    matrix: torch.Tensor, right: torch.Tensor | None, left: torch.Tensor | None, into: Sweep | None
) -> Sweep | None:
    """The sums by the compiled kernel; None for what it does not take. It runs on every small product of a step, so it
    asks each tensor as little as possible; shapes are compared in C.
    """
    shape = matrix.shape
    if len(shape) < 2:
        return None
    rows, columns = into if into is not None else (None, None)
    from_rows: _Weights | None = _NONE
    from_columns: _Weights | None = _NONE
    to_rows = to_columns = 0
    if right is not None:
        from_rows = _weights(right)
        rows = _empty_sums(shape[:-2], shape[-2], right.shape[-1]) if rows is None else rows
        to_rows = rows.data_ptr()
    if left is not None:
        from_columns = _weights(left)
        columns = _empty_sums(shape[:-2], shape[-1], left.shape[-1]) if columns is None else columns
        to_columns = columns.data_ptr()
    if from_rows is None or from_columns is None:
        return None
    return Sweep(rows, columns) if _run(matrix, from_rows, from_columns, to_rows, to_columns) else None


def _weights(vectors: torch.Tensor) -> _Weights | None:
    """What the compiled kernel is told of weights; None for what it does not take."""
    if vectors.dtype is not torch.float32 or not vectors.is_cpu or vectors.is_neg():
        return None
    return vectors.data_ptr(), vectors.shape, vectors.stride()


def _run(matrix: torch.Tensor, from_rows: _Weights, from_columns: _Weights, to_rows: int, to_columns: int) -> bool:
    dtype = matrix.dtype
    if dtype not in _DTYPES or matrix.is_neg():
        return False
    return _compiled.sweep(
        matrix.data_ptr(),
        matrix.shape,
        matrix.stride(),
        dtype is torch.bfloat16,
        *from_rows,
        *from_columns,
        to_rows,
        to_columns,
        _GOMP_PARALLEL,
        torch.get_num_threads(),
    )


def _empty_sums(batch: tuple[int, ...], length: int, count: int) -> torch.Tensor:
    """Memory for (length, count) or (b, length, count) sums, each vector of `length` contiguous."""
    if batch:
        size, stride = (batch[0], length, count), (length * count, 1, length)
        return torch.empty_strided(size, stride, dtype=torch.float32, device="cpu")
    return torch.empty_strided((length, count), (1, length), dtype=torch.float32, device="cpu")


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
