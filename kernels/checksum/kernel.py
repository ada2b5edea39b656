"""The Triton kernel that reads a matrix once and leaves its weighted sums. No launches, no choice of sizes.

Shapes: matrices of m×n, b of them; c weight vectors from the right, c' from the left. A program takes a panel of
BLOCK_N columns and some rows of one matrix, and walks down the rows. The weights of its columns, and its column sums,
stay in registers; a row's sum over the panel is stored as soon as it is there. Panels and chunks are added up
afterwards, in a fixed order: the result is the same in every run.

Reads matrix (b, m, n), any floating-point dtype up to float32; right (b, n, c) and left (b, m, c'), float32. Strides
are named by tensor and dimension; right_b and left_b are 0 for one set of weights for all matrices. Writes row_parts
(b, panels, c, m) and column_parts (b, chunks, c', n), float32; with STATISTICS also, one a program, largest_parts, the
largest finite magnitudes in float32, and count_parts, int32, how many values are not finite. With INJECT, a load of the
element (fault_matrix, fault_row, fault_column) gives fault_value.
"""

# Triton has no types, and reads arguments of kernels by its own rules.
# ruff: noqa: RUF005 (Triton joins tuples by + only)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# mypy: disable-error-code=assignment

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["sweep_kernel"]


# Sizes that differ from matrix to matrix and gain nothing from being known would only multiply compilations.
@triton.jit(
    do_not_specialize=[
        "num_rows",
        "rows_per_program",
        "num_chunks",
        "num_panels",
        "fault_matrix",
        "fault_row",
        "fault_column",
    ]
)
def sweep_kernel(
    matrix, right, left, row_parts, column_parts, largest_parts, count_parts,
    num_rows, num_columns, rows_per_program, num_chunks, num_panels,
    matrix_b, matrix_m, matrix_n, right_b, right_n, right_c, left_b, left_m, left_c,
    fault_matrix, fault_row, fault_column, fault_value,
    NUM_RIGHT: tl.constexpr, NUM_LEFT: tl.constexpr, STATISTICS: tl.constexpr, INJECT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Sums of the panel and chunk that the program's number stands for; the head of this file has the shapes."""
    program = tl.program_id(0)
    panel = program % num_panels
    chunk = program // num_panels % num_chunks
    batch = (program // num_panels // num_chunks).to(tl.int64)

    columns = panel * BLOCK_N + tl.arange(0, BLOCK_N)
    in_columns = columns < num_columns
    wide_columns = columns.to(tl.int64)
    base = matrix + batch * matrix_b + wide_columns[None, :] * matrix_n

    weights = ()
    for c in tl.static_range(NUM_RIGHT):
        weight_at = right + batch * right_b + wide_columns * right_n + c * right_c
        weights = weights + (tl.load(weight_at, mask=in_columns, other=0.0),)
    sums = ()
    for _ in tl.static_range(NUM_LEFT):
        sums = sums + (tl.zeros((BLOCK_M, BLOCK_N), tl.float32),)
    largest = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    count = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)

    first = chunk * rows_per_program
    last = tl.minimum(first + rows_per_program, num_rows)
    for start in range(first, last, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        in_rows = rows < last
        inside = in_rows[:, None] & in_columns[None, :]
        wide_rows = rows.to(tl.int64)
        values = tl.load(base + wide_rows[:, None] * matrix_m, mask=inside, other=0.0).to(tl.float32)
        if INJECT:
            struck = (rows == fault_row)[:, None] & (columns == fault_column)[None, :] & (batch == fault_matrix)
            values = tl.where(struck, fault_value, values)
        for c in tl.static_range(NUM_RIGHT):
            row_at = row_parts + ((batch * num_panels + panel) * NUM_RIGHT + c) * num_rows + rows
            tl.store(row_at, tl.sum(values * weights[c][None, :], axis=1), mask=in_rows)
        grown = ()
        for c in tl.static_range(NUM_LEFT):
            weight = tl.load(left + batch * left_b + wide_rows * left_m + c * left_c, mask=in_rows, other=0.0)
            grown = grown + (sums[c] + values * weight[:, None],)
        sums = grown
        if STATISTICS:
            finite = tl.abs(values) < float("inf")
            largest = tl.maximum(largest, tl.where(finite, tl.abs(values), 0.0))
            count += tl.where(finite, 0, 1)

    for c in tl.static_range(NUM_LEFT):
        column_at = column_parts + ((batch * num_chunks + chunk) * NUM_LEFT + c) * num_columns + columns
        tl.store(column_at, tl.sum(sums[c], axis=0), mask=in_columns)
    if STATISTICS:
        tl.store(largest_parts + program, tl.max(tl.max(largest, axis=1), axis=0))
        tl.store(count_parts + program, tl.sum(tl.sum(count, axis=1), axis=0))
