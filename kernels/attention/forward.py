"""Flash attention's forward with its checks. One Triton kernel; what it proves is derived in README.md.

Shapes: q, o (b, h, tq, d), k, v (b, hk, tk, d) by strides with the last one 1, or packed (total, h, d) under
`cu_seqlens`; lse (b·h, max_q) float32, natural logarithm. One block is a tile of BLOCK_M queries of one head.
"""

# Triton has no types, and reads arguments of kernels by its own rules.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

from .device import (
    load_tile,
    of_products,
    of_sums,
    operand,
    reference_column,
    seen,
    sequence_of,
    settle,
    store_tile,
    strike,
    weigh,
)

__all__ = ["attention_forward_kernel"]

_SCORES = tl.constexpr(1)
_PROBS = tl.constexpr(2)
_ROW_SUM = tl.constexpr(3)
_CONTEXT = tl.constexpr(4)

# Tolerances, each from a measurement and a bound: README.md.
_TOLERANCE_ROW_SUM = tl.constexpr(8e-3)
_FLOOR_HALF = tl.constexpr(1.2e-7)
# No exponential is above 1; twice that, so that clean rows have a ratio below one half, as with the other checks.
_MOST_OF_A_KEY = tl.constexpr(2.002)


@triton.jit
def _visit(
    state, q, k, v, facts, stride_kt, stride_vt,
    first, last, rows, length_k, scale_log2, strikes, block, attempt,
    D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_N: tl.constexpr, NUM_COLUMNS: tl.constexpr,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, CHECKED: tl.constexpr, INJECT: tl.constexpr,
):  # fmt: skip
    """Keys `first` … `last` − 1, in tiles."""
    acc, row_sum, row_max, checked, score_sums, k_sum, k_norm, v_norm = state
    v_columns, k_sums, k_norms, v_norms = facts
    for start in range(first, last, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        k_tile = load_tile(k, keys, length_k, stride_kt, D, D_PAD)
        scores = tl.dot(q, tl.trans(k_tile))
        if INJECT == _SCORES:
            scores = strike(scores, strikes, block, start // BLOCK_N, attempt)
        if CHECKED:
            # Before the mask: a sum over the whole tile is linear in K.
            tile = start // BLOCK_N
            score_sums += tl.sum(scores, 1)
            k_sum += tl.load(k_sums + tile * D_PAD + tl.arange(0, D_PAD))
            k_norm += tl.load(k_norms + tile * 2)
            v_norm += tl.load(v_norms + tile * 2)
        scores = scores * scale_log2
        if MASKED:
            visible = (keys < length_k)[None, :]
            if CAUSAL:
                visible = visible & (keys[None, :] <= rows[:, None])
            scores = tl.where(visible, scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        probs = tl.exp2(scores - shift[:, None])
        if INJECT == _PROBS:
            probs = strike(probs, strikes, block, start // BLOCK_N, attempt)
        shrink = tl.exp2(row_max - shift)
        row_sum = row_sum * shrink + tl.sum(probs, 1)
        row_max = new_max
        v_tile = load_tile(v, keys, length_k, stride_vt, D, D_PAD)
        rounded = probs.to(v_tile.dtype)
        acc = tl.dot(rounded, v_tile, acc * shrink[:, None])
        if INJECT == _CONTEXT:
            acc = strike(acc, strikes, block, start // BLOCK_N, attempt)
        if CHECKED:
            index = tl.arange(0, NUM_COLUMNS)
            columns = tl.load(v_columns + keys[:, None] * NUM_COLUMNS + index[None, :])
            checked = tl.dot(rounded, columns, checked * shrink[:, None])
    return acc, row_sum, row_max, checked, score_sums, k_sum, k_norm, v_norm


@triton.jit
def _hold(
    q, k_sum, k_norm, v_norm, score_sums, out, inverse, row_sum, checked, valid, num_keys, tolerance_scale,
    D_PAD: tl.constexpr, BLOCK_N: tl.constexpr, WIDE_RANGE: tl.constexpr,
):  # fmt: skip
    """(bits of the failing checks, worst ratio, whether the operands are to blame) of one tile of queries."""
    score_scale = tl.sqrt(tl.sum(q * q, 1)) * k_norm
    score_ratio = weigh(score_sums - tl.sum(q * k_sum[None, :], 1),
                        score_scale * (of_sums(D_PAD, num_keys / BLOCK_N) * tolerance_scale), valid)  # fmt: skip
    floor: tl.constexpr = 0.0 if WIDE_RANGE else _FLOOR_HALF
    context_scale = (of_products(num_keys) * reference_column(checked, 3)) * inverse + floor
    context_ratio = weigh(tl.sum(out, 1) / D_PAD - reference_column(checked, 0) * inverse,
                          context_scale * tolerance_scale, valid)  # fmt: skip
    rounded_sum = reference_column(checked, 4)
    sum_ratio = weigh(row_sum - rounded_sum, rounded_sum * (_TOLERANCE_ROW_SUM * tolerance_scale), valid)
    sum_ratio = tl.maximum(sum_ratio, weigh(row_sum, tl.zeros_like(row_sum) + _MOST_OF_A_KEY * num_keys, valid))
    checks = tl.where(score_ratio <= 1.0, 0, 1)
    checks += tl.where(context_ratio <= 1.0, 0, 2)
    checks += tl.where(sum_ratio <= 1.0, 0, 4)
    inputs = tl.max(tl.where(valid & ~(score_scale + v_norm < float("inf")), 1, 0), 0)
    return checks, tl.maximum(tl.maximum(score_ratio, context_ratio), sum_ratio), inputs


@triton.jit(do_not_specialize=["attempt", "last_attempt", "sequence", "layer", "capacity"])
def attention_forward_kernel(
    q, k, v, o, lse, cu_q, cu_k,
    v_columns, k_sums, k_norms, v_norms, status, ring, cursor, strikes,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt,
    stride_vb, stride_vh, stride_vt, stride_ob, stride_oh, stride_ot,
    heads, group, length_q, length_k, tiles_k, max_q, scale_log2, tolerance_scale,
    capacity, attempt, last_attempt, sequence, layer,
    D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, NUM_COLUMNS: tl.constexpr,
    CAUSAL: tl.constexpr, VARLEN: tl.constexpr, CHECKED: tl.constexpr, INJECT: tl.constexpr, SM_KNOWN: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of queries, batch·heads). At attempt 0 every block runs; later ones run only what failed before."""
    tile = tl.program_id(0)
    pair = tl.program_id(1)
    block = pair * tl.num_programs(0) + tile
    if CHECKED:  # noqa: SIM102  # the outer condition is the compiler's
        if tl.load(status + block * 4, mask=attempt > 0, other=1) == 0:
            return
    batch = (pair // heads).to(tl.int64)
    head = (pair % heads).to(tl.int64)
    key_head = head // group
    start_q, length_q = sequence_of(cu_q, batch, length_q, VARLEN)
    start_k, length_k = sequence_of(cu_k, batch, length_k, VARLEN)
    q = operand(q, batch, head, start_q, stride_qb, stride_qh, stride_qt)
    o = operand(o, batch, head, start_q, stride_ob, stride_oh, stride_ot)
    k = operand(k, batch, key_head, start_k, stride_kb, stride_kh, stride_kt)
    v = operand(v, batch, key_head, start_k, stride_vb, stride_vh, stride_vt)
    first_row = (batch * (heads // group) + key_head) * tiles_k
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    q_tile = load_tile(q, rows, length_q, stride_qt, D, D_PAD)
    acc = tl.zeros([BLOCK_M, D_PAD], tl.float32)
    columns = tl.zeros([BLOCK_M, NUM_COLUMNS], tl.float32)
    zeros = tl.zeros([BLOCK_M], tl.float32)
    state = (acc, zeros, zeros + float("-inf"), columns, zeros, tl.zeros([D_PAD], tl.float32), 0.0, 0.0)
    end, whole = seen(tile, length_q, length_k, BLOCK_M, BLOCK_N, CAUSAL)
    facts = (v_columns + first_row * (BLOCK_N * NUM_COLUMNS), k_sums + first_row * D_PAD, k_norms + first_row * 2,
             v_norms + first_row * 2)  # fmt: skip
    state = _visit(state, q_tile, k, v, facts, stride_kt, stride_vt, 0, whole, rows, length_k, scale_log2, strikes,
                   block, attempt, D, D_PAD, BLOCK_N, NUM_COLUMNS, CAUSAL, False, CHECKED, INJECT)  # fmt: skip
    state = _visit(state, q_tile, k, v, facts, stride_kt, stride_vt, whole, end, rows, length_k, scale_log2, strikes,
                   block, attempt, D, D_PAD, BLOCK_N, NUM_COLUMNS, CAUSAL, True, CHECKED, INJECT)  # fmt: skip
    acc, row_sum, row_max, checked, score_sums, k_sum, k_norm, v_norm = state
    if INJECT == _ROW_SUM:
        row_sum = tl.sum(strike(row_sum[:, None], strikes, block, 0, attempt), 1)

    empty = row_max == float("-inf")
    inverse = tl.where(empty, 0.0, 1.0 / row_sum)
    out = acc * inverse[:, None]
    log_sum = tl.where(empty, float("-inf"), (row_max + tl.log2(row_sum)) * 0.6931471805599453)
    store_tile(o, out, rows, length_q, stride_ot, D, D_PAD)
    tl.store(lse + pair.to(tl.int64) * max_q + rows, log_sum, mask=rows < length_q)

    if CHECKED:
        # Read again: registers that hold the tile through the loop would be spilled.
        q_wide = load_tile(q, rows, length_q, stride_qt, D, D_PAD)
        checks, ratio, inputs = _hold(q_wide.to(tl.float32), k_sum, k_norm, v_norm, score_sums, out, inverse, row_sum,
                                      checked, rows < length_q, end, tolerance_scale, D_PAD, BLOCK_N,
                                      o.dtype.element_ty == tl.bfloat16)  # fmt: skip
        settle(status, ring, cursor, capacity, block, checks, ratio, inputs, attempt, last_attempt, sequence, layer,
               batch.to(tl.int32), head.to(tl.int32), tile, SM_KNOWN)  # fmt: skip
