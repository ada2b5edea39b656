"""Launches of the checksum kernel: sizes, partial sums, their addition. No thresholds, no knowledge of what is checked.

Nothing here waits for the device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton

from .kernel import sweep_kernel

__all__ = ["DTYPES", "MAX_COLUMNS", "Fault", "Sweep", "blocks", "longest_chain", "sweep"]

DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
"""Of matrices; weights and sums are float32."""

MAX_COLUMNS = 8
"""Weight vectors a side in one pass."""

_NUM_PROGRAMS = 2048
"""Programs aimed at: some for each multiprocessor of the largest GPUs."""

_MIN_ROWS = 64
"""Rows a program at least takes: partial sums of columns cost 4·c' bytes for each column of a chunk."""


class Fault(NamedTuple):
    """A wrong value that the kernel shall read; for tests and drills."""

    matrix: int
    """0 for a single one."""
    row: int
    column: int
    value: float


class Sweep(NamedTuple):
    """Sums of one matrix, or of b of them. Every vector of sums is contiguous in memory."""

    rows: torch.Tensor | None
    """matrix · right, (m, c) or (b, m, c), float32."""
    columns: torch.Tensor | None
    """matrixᵀ · left, (n, c') or (b, n, c'), float32."""
    largest: torch.Tensor | None
    """Largest finite magnitude, float32 scalar."""
    num_not_finite: torch.Tensor | None
    """How many elements are INF or NaN, int64 scalar."""


def sweep(
    matrix: torch.Tensor,
    right: torch.Tensor | None = None,
    left: torch.Tensor | None = None,
    *,
    statistics: bool = False,
    fault: Fault | None = None,
) -> Sweep:
    """Read `matrix` once; sum its rows under each column of `right`, its columns under each column of `left`.

    Args:
        matrix: (m, n) or (b, m, n), of `DTYPES`, any strides; fastest if rows or columns lie contiguous.
        right: (n, c), or (b, n, c) for one set a matrix; float32, c ≤ `MAX_COLUMNS`.
        left: (m, c'), or (b, m, c') for one set a matrix; float32, c' ≤ `MAX_COLUMNS`.
        statistics: also give the largest magnitude and the number of values that are not finite.
        fault: compiles a kernel of its own, which reads one wrong value.

    Returns:
        Sums of products and of partial sums in float32; NaN and INF propagate. The same bits in every run.
    """
    if matrix.stride(-1) != 1 and matrix.stride(-2) == 1:
        # The kernel walks along contiguous rows; of a transposed matrix its rows are the columns.
        turned = None if fault is None else fault._replace(row=fault.column, column=fault.row)
        swept = sweep(matrix.mT, left, right, statistics=statistics, fault=turned)
        return swept._replace(rows=swept.columns, columns=swept.rows)
    batched = matrix.dim() == 3
    shape = matrix.shape if batched else (1, *matrix.shape)
    if 0 in shape:
        return _of_nothing(matrix, right, left, statistics=statistics)
    parts = _launch(matrix if batched else matrix[None], right, left, statistics, fault)
    rows, columns = (
        None if part is None else (part[:, 0] if part.shape[1] == 1 else part.sum(1)).mT for part in parts[:2]
    )
    if not batched:
        rows, columns = (None if sums is None else sums[0] for sums in (rows, columns))
    largest, count = parts[2:]
    return Sweep(rows, columns, None if largest is None else largest.amax(), None if count is None else count.sum())


def _launch(
    matrix: torch.Tensor, right: torch.Tensor | None, left: torch.Tensor | None, statistics: bool, fault: Fault | None
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Partial sums of rows (b, panels, c, m), of columns (b, chunks, c', n), statistics (programs,) of (b, m, n)."""
    num_matrices, num_rows, num_columns = matrix.shape
    num_right = 0 if right is None else right.shape[-1]
    num_left = 0 if left is None else left.shape[-1]
    block_m, block_n = blocks(num_left, statistics, num_columns)
    num_panels = triton.cdiv(num_columns, block_n)
    rows_per_program = _rows_per_program(num_rows, num_matrices * num_panels, block_m)
    num_chunks = triton.cdiv(num_rows, rows_per_program)
    num_programs = num_matrices * num_panels * num_chunks

    def empty(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device=matrix.device)

    row_parts = empty(num_matrices, num_panels, num_right, num_rows) if num_right else None
    column_parts = empty(num_matrices, num_chunks, num_left, num_columns) if num_left else None
    largest = empty(num_programs) if statistics else None
    count = empty(num_programs, dtype=torch.int32) if statistics else None
    sweep_kernel[(num_programs,)](
        matrix,
        right,
        left,
        row_parts,
        column_parts,
        largest,
        count,
        num_rows,
        num_columns,
        rows_per_program,
        num_chunks,
        num_panels,
        *matrix.stride(),
        *_strides(right),
        *_strides(left),
        *(fault or Fault(0, 0, 0, 0.0)),
        NUM_RIGHT=num_right,
        NUM_LEFT=num_left,
        STATISTICS=statistics,
        INJECT=fault is not None,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        num_warps=4,
    )
    return row_parts, column_parts, largest, count


def blocks(num_left: int, statistics: bool, num_columns: int) -> tuple[int, int]:
    """BLOCK_M, BLOCK_N: four warps, each with whole rows of the panel, and no more running sums than registers."""
    num_running = num_left + 2 * statistics
    elements_per_thread = 32 if num_running == 0 else 16 if num_running <= 3 else 8
    block_n = max(16, min(256, triton.next_power_of_2(num_columns)))
    return elements_per_thread * 128 // block_n, block_n


def _rows_per_program(num_rows: int, num_panels: int, block_m: int) -> int:
    """A multiple of BLOCK_M that makes about `_NUM_PROGRAMS` programs."""
    rows = max(_MIN_ROWS, -(-num_rows * num_panels // _NUM_PROGRAMS))
    return -(-rows // block_m) * block_m


def longest_chain(num_rows: int, num_columns: int) -> int:
    """Roundings that one term of a sum goes through at most: the product, those within a block, the blocks, the parts.
    For a bound of the round-off.
    """
    return 1 + max(num_rows, num_columns)


def _strides(weights: torch.Tensor | None) -> tuple[int, int, int]:
    if weights is None:
        return 0, 0, 0
    if weights.dim() == 2:
        return 0, weights.stride(0), weights.stride(1)
    return weights.stride(0), weights.stride(1), weights.stride(2)


def _of_nothing(
    matrix: torch.Tensor, right: torch.Tensor | None, left: torch.Tensor | None, *, statistics: bool
) -> Sweep:
    """Sums over no elements are zero."""

    def zeros(length: int, weights: torch.Tensor) -> torch.Tensor:
        return matrix.new_zeros(*matrix.shape[:-2], length, weights.shape[-1], dtype=torch.float32)

    return Sweep(
        None if right is None else zeros(matrix.shape[-2], right),
        None if left is None else zeros(matrix.shape[-1], left),
        matrix.new_zeros((), dtype=torch.float32) if statistics else None,
        matrix.new_zeros((), dtype=torch.int64) if statistics else None,
    )
