"""Flash attention's backward with its checks: one Triton kernel for dQ, one for dK and dV. Derivations in README.md.

Shapes as in forward.py; delta (b·h, max_q) float32 is D_i = dO_i·O_i. P is recomputed from the stored log-sum-exp. dQ
blocks are tiles of queries of a head, dK/dV blocks tiles of keys of a key head, summed over its query heads in one
program: no atomics, hence the same bits every time.
"""

# Triton has no types, and reads arguments of kernels by its own rules.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

from .device import (
    load_tile,
    norm_of,
    of_gradient,
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

__all__ = ["attention_dkdv_kernel", "attention_dq_kernel"]

_SCORES = tl.constexpr(1)
_PROBS = tl.constexpr(2)
_DP = tl.constexpr(5)
_DS = tl.constexpr(6)
_DQ = tl.constexpr(7)
_DK = tl.constexpr(8)
_DV = tl.constexpr(9)

# Tolerances, each from a measurement and a bound: README.md.
_TOLERANCE_MASS = tl.constexpr(5e-5)
_TOLERANCE_EXPONENT = tl.constexpr(5e-7)
_TOLERANCE_DS = tl.constexpr(2.5e-3)
_TOLERANCE_QUOTIENT = tl.constexpr(2e-6)
_LEAST_EXPONENT = tl.constexpr(-64.0)
_FLOOR_HALF = tl.constexpr(1.2e-7)
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _no_keys(BLOCK_M: tl.constexpr, D_PAD: tl.constexpr, NUM_COLUMNS: tl.constexpr):
    """dQ, its checksum columns and the most they were, sums of P, dS − P∘dP and dP, Σv, Σ‖k‖, Σ‖v‖, max‖k‖, max‖v‖
    before any key.
    """
    sums = tl.zeros([BLOCK_M], tl.float32)
    row = tl.zeros([D_PAD], tl.float32)
    acc = tl.zeros([BLOCK_M, D_PAD], tl.float32)
    columns = tl.zeros([BLOCK_M, NUM_COLUMNS], tl.float32)
    return acc, columns, columns, sums, sums, sums, row, 0.0, 0.0, 0.0, 0.0


@triton.jit
def _visit_keys(
    state, q, d_o, lse2, delta, k, v, facts, stride_kt, stride_vt,
    first, last, rows, length_k, scale_log2, strikes, block, attempt,
    D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_N: tl.constexpr, NUM_COLUMNS: tl.constexpr,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, CHECKED: tl.constexpr, INNER: tl.constexpr, INJECT: tl.constexpr,
):  # fmt: skip
    """Keys `first` … `last` − 1, in tiles, for one tile of queries."""
    dq, checked, dq_peak, mass, ds_sums, dp_sums, v_sum, k_norm, v_norm, k_norm_max, v_norm_max = state
    k_columns, v_sums, k_norms, v_norms = facts
    for start in range(first, last, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        k_tile = load_tile(k, keys, length_k, stride_kt, D, D_PAD)
        v_tile = load_tile(v, keys, length_k, stride_vt, D, D_PAD)
        scores = tl.dot(q, tl.trans(k_tile))
        if INJECT == _SCORES:
            scores = strike(scores, strikes, block, start // BLOCK_N, attempt)
        probs = tl.exp2(scores * scale_log2 - lse2[:, None])
        if INJECT == _PROBS:
            probs = strike(probs, strikes, block, start // BLOCK_N, attempt)
        if MASKED:
            visible = (keys < length_k)[None, :]
            if CAUSAL:
                visible = visible & (keys[None, :] <= rows[:, None])
            probs = tl.where(visible, probs, 0.0)
        d_probs = tl.dot(d_o, tl.trans(v_tile))
        if INJECT == _DP:
            d_probs = strike(d_probs, strikes, block, start // BLOCK_N, attempt)
        d_scores = probs * (d_probs - delta[:, None])
        if INJECT == _DS:
            d_scores = strike(d_scores, strikes, block, start // BLOCK_N, attempt)
        rounded = d_scores.to(k_tile.dtype)
        dq = tl.dot(rounded, k_tile, dq)
        if INJECT == _DQ:
            dq = strike(dq, strikes, block, start // BLOCK_N, attempt)
        if CHECKED:
            index = tl.arange(0, NUM_COLUMNS)
            columns = tl.load(k_columns + keys[:, None] * NUM_COLUMNS + index[None, :])
            checked = tl.dot(rounded, columns, checked)
            dq_peak = tl.maximum(dq_peak, tl.abs(checked))
            mass += tl.sum(probs, 1)
            tile = start // BLOCK_N
            k_norm += tl.load(k_norms + tile * 2)
            v_norm += tl.load(v_norms + tile * 2)
            k_norm_max = tl.maximum(k_norm_max, tl.load(k_norms + tile * 2 + 1))
            v_norm_max = tl.maximum(v_norm_max, tl.load(v_norms + tile * 2 + 1))
            if INNER:
                ds_sums += tl.sum(d_scores - probs * d_probs, 1)
                # Not masked: a sum over the whole tile is linear in V.
                dp_sums += tl.sum(d_probs, 1)
                v_sum += tl.load(v_sums + tile * D_PAD + tl.arange(0, D_PAD))
    return dq, checked, dq_peak, mass, ds_sums, dp_sums, v_sum, k_norm, v_norm, k_norm_max, v_norm_max


@triton.jit
def _hold_dq(
    state, q, d_o, delta, doubt, valid, empty, num_keys, scale_log2, tolerance_scale,
    D_PAD: tl.constexpr, BLOCK_N: tl.constexpr, WIDE_RANGE: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """(bits of the failing checks, worst ratio, whether the operands are to blame) of one tile of queries."""
    dq, checked, dq_peak, mass, ds_sums, dp_sums, v_sum, k_norm, v_norm, k_norm_max, v_norm_max = state
    q_norm = tl.sqrt(tl.sum(q * q, 1))
    do_norm = tl.sqrt(tl.sum(d_o * d_o, 1))
    size = do_norm * v_norm_max
    floor: tl.constexpr = 0.0 if WIDE_RANGE else _FLOOR_HALF
    # The exponential multiplies the error of its argument.
    mass_tolerance = _TOLERANCE_MASS + _TOLERANCE_EXPONENT * scale_log2 * q_norm * k_norm_max
    mass_ratio = weigh(mass - tl.where(empty, 0.0, 1.0), mass_tolerance * tolerance_scale, valid & ~empty)
    ds_ratio = weigh(reference_column(checked, 4), (size * _TOLERANCE_DS + floor * num_keys) * tolerance_scale, valid)
    dq_size = norm_of(dq_peak) * tl.sqrt(D_PAD * 1.0)
    dq_tolerance = of_gradient(size * k_norm_max / D_PAD, dq_size, num_keys) + 2.0 * floor * size
    dq_ratio = weigh(tl.sum(dq, 1) / D_PAD - reference_column(checked, 0), dq_tolerance * tolerance_scale, valid)
    checks = tl.where(mass_ratio <= 1.0, 0, 8)
    checks += tl.where(ds_ratio <= 1.0, 0, 16)
    checks += tl.where(dq_ratio <= 1.0, 0, 32)
    ratio = tl.maximum(tl.maximum(mass_ratio, ds_ratio), dq_ratio)
    if INNER:
        tolerance = of_sums(D_PAD, num_keys / BLOCK_N) * tolerance_scale
        dp_ratio = weigh(dp_sums - tl.sum(d_o * v_sum[None, :], 1), do_norm * v_norm * tolerance, valid)
        checks += tl.where(dp_ratio <= 1.0, 0, 1024)
        ds_rows_ratio = weigh(ds_sums + delta * mass, size * tolerance, valid)
        checks += tl.where(ds_rows_ratio <= 1.0, 0, 2048)
        ratio = tl.maximum(ratio, tl.maximum(dp_ratio, ds_rows_ratio))
    inputs = tl.max(tl.where(valid & ~(q_norm + do_norm + k_norm + v_norm + doubt < float("inf")), 1, 0), 0)
    return checks, ratio, inputs


@triton.jit(do_not_specialize=["attempt", "last_attempt", "sequence", "layer", "capacity"])
def attention_dq_kernel(
    q, k, v, d_o, lse, delta, dq, cu_q, cu_k,
    k_columns, v_sums, k_norms, v_norms, status, ring, cursor, strikes,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt,
    stride_vb, stride_vh, stride_vt, stride_db, stride_dh, stride_dt, stride_gb, stride_gh, stride_gt,
    heads, group, length_q, length_k, tiles_k, max_q, scale, tolerance_scale,
    capacity, attempt, last_attempt, sequence, layer,
    D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, NUM_COLUMNS: tl.constexpr,
    CAUSAL: tl.constexpr, VARLEN: tl.constexpr, CHECKED: tl.constexpr, INNER: tl.constexpr, INJECT: tl.constexpr,
    SM_KNOWN: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of queries, batch·heads)."""
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
    d_o = operand(d_o, batch, head, start_q, stride_db, stride_dh, stride_dt)
    dq = operand(dq, batch, head, start_q, stride_gb, stride_gh, stride_gt)
    k = operand(k, batch, key_head, start_k, stride_kb, stride_kh, stride_kt)
    v = operand(v, batch, key_head, start_k, stride_vb, stride_vh, stride_vt)
    first_row = (batch * (heads // group) + key_head) * tiles_k
    facts = (k_columns + first_row * (BLOCK_N * NUM_COLUMNS), v_sums + first_row * D_PAD,
             k_norms + first_row * 2, v_norms + first_row * 2)  # fmt: skip
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = rows < length_q
    q_tile = load_tile(q, rows, length_q, stride_qt, D, D_PAD)
    do_tile = load_tile(d_o, rows, length_q, stride_dt, D, D_PAD)
    lse_rows = tl.load(lse + pair.to(tl.int64) * max_q + rows, mask=valid, other=float("inf"))
    delta_rows = tl.load(delta + pair.to(tl.int64) * max_q + rows, mask=valid, other=0.0)
    empty = lse_rows == float("-inf")
    lse2 = tl.where(empty, float("inf"), lse_rows * _LOG2_E)
    scale_log2 = scale * _LOG2_E
    state = _no_keys(BLOCK_M, D_PAD, NUM_COLUMNS)
    end, whole = seen(tile, length_q, length_k, BLOCK_M, BLOCK_N, CAUSAL)
    state = _visit_keys(state, q_tile, do_tile, lse2, delta_rows, k, v, facts, stride_kt, stride_vt, 0, whole,
                        rows, length_k, scale_log2, strikes, block, attempt, D, D_PAD, BLOCK_N, NUM_COLUMNS, CAUSAL,
                        False, CHECKED, INNER, INJECT)  # fmt: skip
    state = _visit_keys(state, q_tile, do_tile, lse2, delta_rows, k, v, facts, stride_kt, stride_vt, whole, end,
                        rows, length_k, scale_log2, strikes, block, attempt, D, D_PAD, BLOCK_N, NUM_COLUMNS, CAUSAL,
                        True, CHECKED, INNER, INJECT)  # fmt: skip
    store_tile(dq, state[0] * scale, rows, length_q, stride_gt, D, D_PAD)

    if CHECKED:
        # Read again: registers that hold the tiles through the loop would be spilled.
        q_wide = load_tile(q, rows, length_q, stride_qt, D, D_PAD).to(tl.float32)
        do_wide = load_tile(d_o, rows, length_q, stride_dt, D, D_PAD).to(tl.float32)
        doubt = (delta_rows + tl.where(empty, 0.0, lse_rows)) * 0.0
        checks, ratio, inputs = _hold_dq(state, q_wide, do_wide, delta_rows, doubt, valid, empty, end, scale_log2,
                                         tolerance_scale, D_PAD, BLOCK_N, dq.dtype.element_ty == tl.bfloat16,
                                         INNER)  # fmt: skip
        settle(status, ring, cursor, capacity, block, checks, ratio, inputs, attempt, last_attempt, sequence, layer,
               batch.to(tl.int32), head.to(tl.int32), tile, SM_KNOWN)  # fmt: skip


@triton.jit
def _no_queries(BLOCK_N: tl.constexpr, D_PAD: tl.constexpr, NUM_COLUMNS: tl.constexpr):
    """dK, dV, their checksum columns, the largest norm of dK, sums of S and dP, worst residual of dS ÷ P, Σq,
    ΣdO, Σ‖q‖, Σ‖dO‖, max‖q‖ before any query.
    """
    acc = tl.zeros([BLOCK_N, D_PAD], tl.float32)
    columns = tl.zeros([BLOCK_N, NUM_COLUMNS], tl.float32)
    sums = tl.zeros([BLOCK_N], tl.float32)
    row = tl.zeros([D_PAD], tl.float32)
    return acc, acc, columns, columns, sums, sums, sums, sums, row, row, 0.0, 0.0, 0.0


@triton.jit
def _load_statistics(lse, delta, rows, length_q):
    """(LSE in base 2, D) of some queries; those that see no key, and those behind the end, have no P."""
    valid = rows < length_q
    lse_rows = tl.load(lse + rows, mask=valid, other=float("inf"))
    lse2 = tl.where(lse_rows == float("-inf"), float("inf"), lse_rows * _LOG2_E)
    return lse2, tl.load(delta + rows, mask=valid, other=0.0)


@triton.jit
def _invert(probs, scores, scale_log2, lse2, keys, rows, MASKED: tl.constexpr):
    """1 ÷ P from an exponential of its own, and Σ P·(1 ÷ P) over the queries of a tile, 1 of each that sees no key.

    The exponents of P and of 1 ÷ P are fused, and so rounded alike: exact opposites.
    """
    inverse = tl.exp2(tl.minimum(tl.fma(scores, -scale_log2, lse2[None, :]), -_LEAST_EXPONENT))
    units = probs * inverse
    if MASKED:
        units = tl.where(keys[:, None] <= rows[None, :], units, 1.0)
    return inverse, tl.sum(units, 1)


@triton.jit
def _worse_quotient(
    worst, d_scores, inverse, units, d_probs, dp_sum, delta, norms, v_norm_max, keys, rows,
    BLOCK_M: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The larger of `worst` and |Σ dS ÷ P − (dP − D)| ÷ Σ‖dO‖ over the queries of a tile; `norms`: its Σ‖dO‖ and Σ D.

    The second sum is over all queries: what those have that see no key is added to the first. Alone it would not see a
    P whose dP is near D; so Σ P·(1 ÷ P) counts as well, as if dP were as large as it can be.
    """
    quotients = d_scores * inverse
    if MASKED:
        quotients += tl.where(keys[:, None] <= rows[None, :], 0.0, d_probs - delta[None, :])
    do_norm = tl.load(norms)
    residual = tl.sum(quotients, 1) - (dp_sum - tl.load(norms + 1))
    residual += (units - BLOCK_M) * (do_norm * v_norm_max / BLOCK_M)
    return tl.maximum(worst, tl.abs(residual) * (1.0 / (do_norm + 1e-24)), tl.PropagateNan.ALL)


@triton.jit
def _add_columns(
    dk_checked, dv_checked, dk_norm, d_scores, probs, q_columns, do_columns, rows, NUM_COLUMNS: tl.constexpr
):  # fmt: skip
    """What dK and dV are made of, added to their checksum columns; the largest norm of dK with it."""
    index = rows[:, None] * NUM_COLUMNS + tl.arange(0, NUM_COLUMNS)[None, :]
    dv_checked = tl.dot(probs, tl.load(do_columns + index), dv_checked)
    dk_checked = tl.dot(d_scores, tl.load(q_columns + index), dk_checked)
    # Not kept column by column, as that of dQ is: this kernel has no registers left.
    return dk_checked, dv_checked, tl.maximum(dk_norm, norm_of(dk_checked))


@triton.jit
def _visit_queries(
    state, k, v, of_head, stride_qt, stride_dt,
    first, last, keys, length_q, scale_log2, strikes, block, first_tile, attempt,
    D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_M: tl.constexpr, NUM_COLUMNS: tl.constexpr,
    MASKED: tl.constexpr, CHECKED: tl.constexpr, INNER: tl.constexpr, INJECT: tl.constexpr,
):  # fmt: skip
    """Queries `first` … `last` − 1 of one head, in tiles, for one tile of keys; tiles of scores are (keys, queries)."""
    (dk, dv, dk_checked, dv_checked, dk_norm, score_sums, dp_sums, quotient, q_sum, do_sum, q_norm, do_norm,
     q_norm_max) = state  # fmt: skip
    q, d_o, lse, delta, q_columns, do_columns, q_sums, do_sums, q_norms, do_norms, v_norm_max = of_head
    depth = tl.arange(0, D_PAD)
    for start in range(first, last, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        tile = start // BLOCK_M
        q_tile = load_tile(q, rows, length_q, stride_qt, D, D_PAD)
        do_tile = load_tile(d_o, rows, length_q, stride_dt, D, D_PAD)
        lse2, delta_rows = _load_statistics(lse, delta, rows, length_q)
        scores = tl.dot(k, tl.trans(q_tile))
        if INJECT == _SCORES:
            scores = strike(scores, strikes, block, first_tile + tile, attempt)
        # Bounded, so that 1 ÷ P is a number: 5e-20 is nothing beside the row's other P. By itself a maximum drops NaN.
        exponents = tl.fma(scores, scale_log2, -lse2[None, :])
        probs = tl.exp2(tl.maximum(exponents, _LEAST_EXPONENT, propagate_nan=tl.PropagateNan.ALL))
        if INJECT == _PROBS:
            probs = strike(probs, strikes, block, first_tile + tile, attempt)
        if CHECKED and INNER:
            inverse, units = _invert(probs, scores, scale_log2, lse2, keys, rows, MASKED)
            score_sums += tl.sum(scores, 1)
        if MASKED:
            probs = tl.where(keys[:, None] <= rows[None, :], probs, 0.0)
        rounded_probs = probs.to(do_tile.dtype)
        dv = tl.dot(rounded_probs, do_tile, dv)
        if INJECT == _DV:
            dv = strike(dv, strikes, block, first_tile + tile, attempt)
        d_probs = tl.dot(v, tl.trans(do_tile))
        if INJECT == _DP:
            d_probs = strike(d_probs, strikes, block, first_tile + tile, attempt)
        d_scores = probs * (d_probs - delta_rows[None, :])
        if INJECT == _DS:
            d_scores = strike(d_scores, strikes, block, first_tile + tile, attempt)
        rounded_scores = d_scores.to(q_tile.dtype)
        dk = tl.dot(rounded_scores, q_tile, dk)
        if INJECT == _DK:
            dk = strike(dk, strikes, block, first_tile + tile, attempt)
        if CHECKED:
            dk_checked, dv_checked, dk_norm = _add_columns(
                dk_checked, dv_checked, dk_norm, rounded_scores, rounded_probs, q_columns, do_columns, rows, NUM_COLUMNS
            )
            q_norm += tl.load(q_norms + tile * 2)
            do_norm += tl.load(do_norms + tile * 2)
            q_norm_max = tl.maximum(q_norm_max, tl.load(q_norms + tile * 2 + 1))
            if INNER:
                dp_sum = tl.sum(d_probs, 1)
                dp_sums += dp_sum
                quotient = _worse_quotient(quotient, d_scores, inverse, units, d_probs, dp_sum, delta_rows,
                                           do_norms + tile * 2, v_norm_max, keys, rows, BLOCK_M, MASKED)  # fmt: skip
                q_sum += tl.load(q_sums + tile * D_PAD + depth)
                do_sum += tl.load(do_sums + tile * D_PAD + depth)
    return (dk, dv, dk_checked, dv_checked, dk_norm, score_sums, dp_sums, quotient, q_sum, do_sum, q_norm, do_norm,
            q_norm_max)  # fmt: skip


@triton.jit
def _hold_dkdv(
    state, k_tile, v_tile, v_norm_max, valid, num_queries, tolerance_scale,
    D_PAD: tl.constexpr, BLOCK_M: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """(bits of the failing checks, worst ratio, whether the operands are to blame) of one tile of keys."""
    (dk, dv, dk_checked, dv_checked, dk_norm, score_sums, dp_sums, quotient, q_sum, do_sum, q_norm, do_norm,
     q_norm_max) = state  # fmt: skip
    k = k_tile.to(tl.float32)
    v = v_tile.to(tl.float32)
    k_norm = tl.sqrt(tl.sum(k * k, 1))
    v_norm = tl.sqrt(tl.sum(v * v, 1))
    floor: tl.constexpr = 0.0 if k_tile.dtype == tl.bfloat16 else _FLOOR_HALF
    mass = reference_column(dv_checked, 3) + floor * reference_column(dv_checked, 4)
    dv_ratio = weigh(tl.sum(dv, 1) / D_PAD - reference_column(dv_checked, 0),
                     (of_products(num_queries) * reference_column(dv_checked, 3)
                      + floor * reference_column(dv_checked, 4)) * tolerance_scale, valid)  # fmt: skip
    # P of dS is not rounded: in float16 it may be there where that of dV has become zero.
    size = 2.0 * v_norm_max * (mass * D_PAD + floor * do_norm)
    dk_size = dk_norm * tl.sqrt(D_PAD * 1.0)
    dk_tolerance = of_gradient(size * q_norm_max / D_PAD, dk_size, num_queries) + floor * size
    dk_ratio = weigh(tl.sum(dk, 1) / D_PAD - reference_column(dk_checked, 0), dk_tolerance * tolerance_scale, valid)
    checks = tl.where(dv_ratio <= 1.0, 0, 64)
    checks += tl.where(dk_ratio <= 1.0, 0, 128)
    ratio = tl.maximum(dv_ratio, dk_ratio)
    if INNER:
        tolerance = of_sums(D_PAD, num_queries / BLOCK_M) * tolerance_scale
        score_ratio = weigh(score_sums - tl.sum(k * q_sum[None, :], 1), k_norm * q_norm * tolerance, valid)
        dp_ratio = weigh(dp_sums - tl.sum(v * do_sum[None, :], 1), v_norm * do_norm * tolerance, valid)
        checks += tl.where(score_ratio <= 1.0, 0, 256)
        checks += tl.where(dp_ratio <= 1.0, 0, 512)
        quotient_tolerance = tl.where(valid, v_norm_max * (_TOLERANCE_QUOTIENT * tolerance_scale), 0.0)
        quotient_ratio = weigh(quotient, quotient_tolerance, valid)
        checks += tl.where(quotient_ratio <= 1.0, 0, 4096)
        ratio = tl.maximum(ratio, tl.maximum(tl.maximum(score_ratio, dp_ratio), quotient_ratio))
    inputs = tl.max(tl.where(valid & ~(k_norm + v_norm + q_norm + do_norm < float("inf")), 1, 0), 0)
    return checks, ratio, inputs


@triton.jit(do_not_specialize=["attempt", "last_attempt", "sequence", "layer", "capacity"])
def attention_dkdv_kernel(
    q, k, v, d_o, lse, delta, dk, dv, cu_q, cu_k,
    q_columns, do_columns, q_sums, do_sums, q_norms, do_norms, v_norm_max, status, ring, cursor, strikes,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_db, stride_dh, stride_dt, stride_xb, stride_xh, stride_xt, stride_yb, stride_yh, stride_yt,
    heads, group, length_q, length_k, tiles_q, max_q, scale, tolerance_scale,
    capacity, attempt, last_attempt, sequence, layer,
    D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, NUM_COLUMNS: tl.constexpr,
    CAUSAL: tl.constexpr, VARLEN: tl.constexpr, CHECKED: tl.constexpr, INNER: tl.constexpr, INJECT: tl.constexpr,
    SM_KNOWN: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of keys, batch·key heads). Strides x are those of dk, y of dv. v_norm_max: (batch·key heads,)."""
    tile, pair = tl.program_id(0), tl.program_id(1)
    block = pair * tl.num_programs(0) + tile
    if CHECKED:  # noqa: SIM102  # the outer condition is the compiler's
        if tl.load(status + block * 4, mask=attempt > 0, other=1) == 0:
            return
    key_heads = heads // group
    batch = (pair // key_heads).to(tl.int64)
    key_head = (pair % key_heads).to(tl.int64)
    start_q, length_q = sequence_of(cu_q, batch, length_q, VARLEN)
    start_k, length_k = sequence_of(cu_k, batch, length_k, VARLEN)
    q = operand(q, batch, key_head * group, start_q, stride_qb, stride_qh, stride_qt)
    d_o = operand(d_o, batch, key_head * group, start_q, stride_db, stride_dh, stride_dt)
    k = operand(k, batch, key_head, start_k, stride_kb, stride_kh, stride_kt)
    v = operand(v, batch, key_head, start_k, stride_vb, stride_vh, stride_vt)
    dk = operand(dk, batch, key_head, start_k, stride_xb, stride_xh, stride_xt)
    dv = operand(dv, batch, key_head, start_k, stride_yb, stride_yh, stride_yt)
    keys = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    k_tile = load_tile(k, keys, length_k, stride_kt, D, D_PAD)
    v_tile = load_tile(v, keys, length_k, stride_vt, D, D_PAD)
    v_max = tl.load(v_norm_max + pair) if CHECKED else 0.0
    state = _no_queries(BLOCK_N, D_PAD, NUM_COLUMNS)
    end = tl.where(tile * BLOCK_N < length_k, length_q, 0)
    # Under a causal mask, queries before `first` see none of these keys, those from `whole` on all of them.
    first = tl.minimum(tile * BLOCK_N // BLOCK_M * BLOCK_M, end)
    whole = tl.minimum(tl.cdiv((tile + 1) * BLOCK_N, BLOCK_M) * BLOCK_M, end) if CAUSAL else 0
    for member in range(group):
        query_row = batch * heads + key_head * group + member
        at = query_row * tiles_q
        of_head = (q + member * stride_qh, d_o + member * stride_dh, lse + query_row * max_q, delta + query_row * max_q,
                   q_columns + at * (BLOCK_M * NUM_COLUMNS), do_columns + at * (BLOCK_M * NUM_COLUMNS),
                   q_sums + at * D_PAD, do_sums + at * D_PAD, q_norms + at * 2, do_norms + at * 2, v_max)  # fmt: skip
        if CAUSAL:
            state = _visit_queries(state, k_tile, v_tile, of_head, stride_qt, stride_dt, first, whole, keys, length_q,
                                   scale * _LOG2_E, strikes, block, member * tiles_q, attempt, D, D_PAD, BLOCK_M,
                                   NUM_COLUMNS, True, CHECKED, INNER, INJECT)  # fmt: skip
        state = _visit_queries(state, k_tile, v_tile, of_head, stride_qt, stride_dt, whole, end, keys, length_q,
                               scale * _LOG2_E, strikes, block, member * tiles_q, attempt, D, D_PAD, BLOCK_M,
                               NUM_COLUMNS, False, CHECKED, INNER, INJECT)  # fmt: skip
    store_tile(dk, state[0] * scale, keys, length_k, stride_xt, D, D_PAD)
    store_tile(dv, state[1], keys, length_k, stride_yt, D, D_PAD)
    if CHECKED:
        # Read again: registers that hold the tiles through the loop would be spilled.
        k_again = load_tile(k, keys, length_k, stride_kt, D, D_PAD)
        v_again = load_tile(v, keys, length_k, stride_vt, D, D_PAD)
        checks, ratio, inputs = _hold_dkdv(state, k_again, v_again, v_max, keys < length_k,
                                           group * (end - first), tolerance_scale, D_PAD, BLOCK_M, INNER)  # fmt: skip
        settle(status, ring, cursor, capacity, block, checks, ratio, inputs, attempt, last_attempt, sequence, layer,
               batch.to(tl.int32), key_head.to(tl.int32), tile, SM_KNOWN)  # fmt: skip
