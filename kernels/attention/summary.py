"""What the checks need to know of the operands, in one pass over each: row sums, tile sums, norms; and D = dO·O.

Shapes, per (batch, head) pair: columns (tiles·BLOCK, c) in the operand's dtype, [hi, mid, lo of x·1 ÷ D_PAD, ‖x‖ ÷
D_PAD, 1, x·r ÷ D_PAD for three vectors r of signs, 0 …]; sums (tiles, D_PAD) float32, Σ x of a tile; norms (tiles, 2)
float32, Σ‖x‖ and max‖x‖ of a tile, of dO Σ‖dO‖ and Σ D. The three parts of x·1 carry it to about 2⁻²⁴ through a matrix
unit that takes 8 (or 11) bits. Division by D_PAD, a power of two, keeps float16 from overflowing. Rows behind the end
count as zero.
"""

# Triton has no types, and reads arguments of kernels by its own rules.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

from .device import load_tile, operand, sequence_of

__all__ = ["summarise_keys", "summarise_queries"]


@triton.jit
def _signs(depth, NUMBER: tl.constexpr):
    """Fixed pseudo-random signs, another vector for each number."""
    mixed = (depth + 1).to(tl.uint32) * 0x9E3779B1
    mixed = (mixed ^ (mixed >> 15)) * 0x85EBCA77
    return 1.0 - 2.0 * ((mixed >> (19 + 4 * NUMBER)) & 1).to(tl.float32)


@triton.jit
def _summarise(
    x, rows, num_rows, stride_t, columns, sums, norms, tile, doubt,
    D: tl.constexpr, D_PAD: tl.constexpr, NUM_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Columns, sums and Σ‖x‖ + `doubt` of one tile; the pointers are those of its (batch, head) pair.

    Returns max‖x‖.
    """
    stored = load_tile(x, rows, num_rows, stride_t, D, D_PAD)
    values = stored.to(tl.float32)
    depth = tl.arange(0, D_PAD)
    norm = tl.sqrt(tl.sum(values * values, 1))
    total = tl.sum(values, 1) / D_PAD
    hi = total.to(stored.dtype).to(tl.float32)
    mid = (total - hi).to(stored.dtype).to(tl.float32)
    lo = total - hi - mid
    index = tl.arange(0, NUM_COLUMNS)[None, :]
    block = tl.where(index == 1, mid[:, None], tl.where(index == 0, hi[:, None], 0.0))
    block = tl.where(index == 2, lo[:, None], tl.where(index == 3, norm[:, None] / D_PAD, block))
    block = tl.where(index == 4, 1.0, block)
    for number in tl.static_range(3):
        sketch = tl.sum(values * _signs(depth, number)[None, :], 1) / D_PAD
        block = tl.where(index == 5 + number, sketch[:, None], block)
    tl.store(columns + rows[:, None] * NUM_COLUMNS + index, block.to(stored.dtype))
    tl.store(sums + tile * D_PAD + depth, tl.sum(values, 0))
    tl.store(norms + tile * 2, tl.sum(norm, 0) + doubt)
    return tl.max(norm, 0)


@triton.jit
def summarise_keys(
    k, v, cu_k,
    k_columns, v_columns, k_sums, v_sums, k_norms, v_norms,
    stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    heads, length_k, tiles,
    D: tl.constexpr, D_PAD: tl.constexpr, BLOCK: tl.constexpr, NUM_COLUMNS: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, batch·key heads)."""
    tile = tl.program_id(0)
    pair = tl.program_id(1)
    batch = (pair // heads).to(tl.int64)
    head = (pair % heads).to(tl.int64)
    start, length_k = sequence_of(cu_k, batch, length_k, VARLEN)
    k = operand(k, batch, head, start, stride_kb, stride_kh, stride_kt)
    v = operand(v, batch, head, start, stride_vb, stride_vh, stride_vt)
    rows = tile * BLOCK + tl.arange(0, BLOCK)
    first_row = pair.to(tl.int64) * tiles
    columns = first_row * (BLOCK * NUM_COLUMNS)
    k_norms += first_row * 2
    v_norms += first_row * 2
    k_max = _summarise(k, rows, length_k, stride_kt, k_columns + columns, k_sums + first_row * D_PAD, k_norms, tile,
                       0.0, D, D_PAD, NUM_COLUMNS)  # fmt: skip
    v_max = _summarise(v, rows, length_k, stride_vt, v_columns + columns, v_sums + first_row * D_PAD, v_norms, tile,
                       0.0, D, D_PAD, NUM_COLUMNS)  # fmt: skip
    tl.store(k_norms + tile * 2 + 1, k_max)
    tl.store(v_norms + tile * 2 + 1, v_max)


@triton.jit
def summarise_queries(
    q, o, d_o, lse, cu_q, delta,
    q_columns, do_columns, q_sums, do_sums, q_norms, do_norms,
    stride_qb, stride_qh, stride_qt, stride_ob, stride_oh, stride_ot, stride_db, stride_dh, stride_dt,
    heads, length_q, tiles, max_q,
    D: tl.constexpr, D_PAD: tl.constexpr, BLOCK: tl.constexpr, NUM_COLUMNS: tl.constexpr, VARLEN: tl.constexpr,
    CHECKED: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, batch·heads). `delta`: (batch·heads, max_q) float32, D_i = dO_i·O_i; the only output unchecked."""
    tile = tl.program_id(0)
    pair = tl.program_id(1)
    batch = (pair // heads).to(tl.int64)
    head = (pair % heads).to(tl.int64)
    start, length_q = sequence_of(cu_q, batch, length_q, VARLEN)
    q = operand(q, batch, head, start, stride_qb, stride_qh, stride_qt)
    o = operand(o, batch, head, start, stride_ob, stride_oh, stride_ot)
    d_o = operand(d_o, batch, head, start, stride_db, stride_dh, stride_dt)
    rows = tile * BLOCK + tl.arange(0, BLOCK)
    out = load_tile(o, rows, length_q, stride_ot, D, D_PAD).to(tl.float32)
    d_out = load_tile(d_o, rows, length_q, stride_dt, D, D_PAD).to(tl.float32)
    weights = tl.sum(out * d_out, 1)
    tl.store(delta + pair.to(tl.int64) * max_q + rows, weights, mask=rows < max_q)
    if CHECKED:
        first_row = pair.to(tl.int64) * tiles
        columns = first_row * (BLOCK * NUM_COLUMNS)
        q_norms += first_row * 2
        do_norms += first_row * 2
        q_max = _summarise(q, rows, length_q, stride_qt, q_columns + columns, q_sums + first_row * D_PAD, q_norms,
                           tile, 0.0, D, D_PAD, NUM_COLUMNS)  # fmt: skip
        tl.store(q_norms + tile * 2 + 1, q_max)
        # What is not a number in D or in the log-sum-exp is a bad input of every key that these queries see.
        log_sums = tl.load(lse + pair.to(tl.int64) * max_q + rows, mask=rows < length_q, other=0.0)
        doubt = tl.sum((weights + tl.where(log_sums == float("-inf"), 0.0, log_sums)) * 0.0, 0)
        _summarise(d_o, rows, length_q, stride_dt, do_columns + columns, do_sums + first_row * D_PAD, do_norms, tile,
                   doubt, D, D_PAD, NUM_COLUMNS)  # fmt: skip
        tl.store(do_norms + tile * 2 + 1, tl.sum(weights, 0))
