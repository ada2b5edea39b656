"""Device functions that the kernels share: striking a fault, weighing a residual, settling a block. No kernels here."""

# Triton has no types, and reads arguments of kernels by its own rules.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "load_tile", "norm_of", "of_gradient", "of_products", "of_sums", "operand", "reference_column", "seen",
    "sequence_of", "settle", "store_tile", "strike", "weigh",
]  # fmt: skip

_FIRST_SKETCH = tl.constexpr(5)
_REPAIRED = tl.constexpr(1)
_UNREPAIRED = tl.constexpr(2)
_INPUTS = tl.constexpr(3)


@triton.jit
def sequence_of(cu_seqlens, batch, length, VARLEN: tl.constexpr):
    """First position (int64) and length of a sequence."""
    if VARLEN:
        start = tl.load(cu_seqlens + batch).to(tl.int64)
        return start, (tl.load(cu_seqlens + batch + 1) - start).to(tl.int32)
    else:
        return batch * 0, length


@triton.jit
def operand(x, batch, head, start, stride_b, stride_h, stride_t):
    """Where a head of a sequence begins; batch, head and start are int64."""
    return x + batch * stride_b + head * stride_h + start * stride_t


@triton.jit
def load_tile(x, rows, num_rows, stride_t, D: tl.constexpr, D_PAD: tl.constexpr):
    """Rows of a head, padded with zeros to (rows, D_PAD)."""
    depth = tl.arange(0, D_PAD)[None, :]
    there = (rows[:, None] < num_rows) & (depth < D)
    return tl.load(x + rows[:, None].to(tl.int64) * stride_t + depth, mask=there, other=0.0)


@triton.jit
def store_tile(x, values, rows, num_rows, stride_t, D: tl.constexpr, D_PAD: tl.constexpr):
    """The counterpart of `load_tile`; rounds to the memory's dtype."""
    depth = tl.arange(0, D_PAD)[None, :]
    there = (rows[:, None] < num_rows) & (depth < D)
    tl.store(x + rows[:, None].to(tl.int64) * stride_t + depth, values.to(x.dtype.element_ty), mask=there)


@triton.jit
def seen(tile, length_q, length_k, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr):
    """How many keys a tile of queries sees at all, and how many of them in tiles that need no mask."""
    end = tl.where(tile * BLOCK_M < length_q, length_k, 0)
    whole = end // BLOCK_N * BLOCK_N
    if CAUSAL:
        end = tl.minimum(end, (tile + 1) * BLOCK_M)
        whole = tl.minimum(whole, tile * BLOCK_M // BLOCK_N * BLOCK_N)
    return end, whole


@triton.jit
def strike(values, strikes, block, tile, attempt):
    """Corrupt one element of a 2-D tile, if the test's order names this block, tile and attempt.

    `strikes`: int32 words block, tile, row, column, kind (0 set, 1 xor, 2 multiply), bits, number of attempts struck.
    """
    rows = tl.arange(0, values.shape[0])[:, None]
    columns = tl.arange(0, values.shape[1])[None, :]
    bits = tl.load(strikes + 5)
    kind = tl.load(strikes + 4)
    value = bits.to(tl.float32, bitcast=True)
    flipped = (values.to(tl.int32, bitcast=True) ^ bits).to(tl.float32, bitcast=True)
    struck = tl.where(kind == 0, value, tl.where(kind == 1, flipped, values * value))
    due = (block == tl.load(strikes)) & (tile == tl.load(strikes + 1)) & (attempt < tl.load(strikes + 6))
    return tl.where(due & (rows == tl.load(strikes + 2)) & (columns == tl.load(strikes + 3)), struck, values)


@triton.jit
def reference_column(columns, COLUMN: tl.constexpr):
    """One column of a checksum accumulator (rows, c), as a vector."""
    index = tl.arange(0, columns.shape[1])[None, :]
    if COLUMN == 0:
        return tl.sum(tl.where(index < 3, columns, 0.0), 1)
    return tl.sum(tl.where(index == COLUMN, columns, 0.0), 1)


@triton.jit
def norm_of(columns):
    """(rows,): about ‖x‖ ÷ D_PAD of an accumulator x (rows, D_PAD), from its checksum columns: the largest of its sums
    x·r ÷ D_PAD, three of them under pseudo-random signs r, and one without, for elements of a common sign.
    """
    index = tl.arange(0, columns.shape[1])[None, :]
    return tl.max(tl.where((index == 0) | (index >= _FIRST_SKETCH), tl.abs(columns), 0.0), 1)


@triton.jit
def of_sums(depth, num_tiles):
    """Tolerance of a sum of products of `depth` numbers each, tile after tile, relative to the sum of their bounds."""
    # A matrix unit truncates each product; equal tiles (padding) round the same way each time.
    return 5e-7 + 2e-8 * depth + 2e-8 * num_tiles


@triton.jit
def of_products(length):
    """Tolerance of a sum of `length` weighted rows on a matrix unit, relative to the weighted sum of their norms."""
    # A matrix unit that truncates eight products, aligned with the sum so far, loses about 3e-7 of it.
    return 3e-5 + 4e-8 * length


@triton.jit
def of_gradient(bound, size, length):
    """Tolerance of the mean of a row of dQ or dK, to which a matrix unit has added `length` weighted rows.

    `bound`: on the mean of what was added, from norms of the operands; `size`: of the row's absolute values when they
    were largest, √D_PAD times `norm_of` its columns.
    """
    return 5e-7 * bound + (1e-6 + 4e-9 * length) * size


@triton.jit
def weigh(residual, tolerance, valid):
    """Worst |residual| ÷ tolerance over the valid rows; infinite where one is not finite, or tolerance < 0."""
    # Below 1e-19 the squares in a norm are zero.
    ratio = tl.abs(residual) / (tolerance + 1e-24)
    usable = (ratio == ratio) & (tolerance >= 0.0) & (tolerance < float("inf"))
    return tl.max(tl.where(valid, tl.where(usable, ratio, float("inf")), 0.0), 0)


@triton.jit
def _sm(SM_KNOWN: tl.constexpr):
    if SM_KNOWN:
        return tl.inline_asm_elementwise("mov.u32 $0, %smid;", "=r", [], dtype=tl.int32, is_pure=True, pack=1)
    else:
        return -1


@triton.jit
def settle(
    status, ring, cursor, capacity, block, checks, ratio, inputs_bad,
    attempt, last_attempt, sequence, layer, batch, head, tile, SM_KNOWN: tl.constexpr,
):  # fmt: skip
    """Write the status of a block, and a record as soon as its fate is known.

    A block with failing checks and good inputs keeps its flag for the next launch, up to `last_attempt`.
    """
    words = status + block * 4
    bad = checks != 0
    sm = _sm(SM_KNOWN)
    if attempt == 0:
        tl.store(words + 1, ratio.to(tl.int32, bitcast=True))
        tl.store(words + 2, sm)
        tl.store(words + 3, checks)
    again = bad & (inputs_bad == 0)
    tl.store(words, tl.where(again, checks, 0))
    if (bad & ((inputs_bad != 0) | (attempt == last_attempt))) | ((checks == 0) & (attempt > 0)):
        slot = tl.atomic_add(cursor, 1)
        if slot < capacity:
            repeated = attempt > 0
            fields = ring + slot * 10
            tl.store(fields, sequence)
            tl.store(fields + 1, tl.load(words + 3, mask=repeated, other=0) | tl.where(repeated, 0, checks))
            tl.store(fields + 2, layer)
            tl.store(fields + 3, batch)
            tl.store(fields + 4, head)
            tl.store(fields + 5, tile)
            first_sm = tl.load(words + 2, mask=repeated, other=0)
            tl.store(fields + 6, tl.where(repeated, first_sm, sm))
            first_ratio = tl.load(words + 1, mask=repeated, other=0)
            tl.store(fields + 7, tl.where(repeated, first_ratio, ratio.to(tl.int32, bitcast=True)))
            tl.store(fields + 8, tl.where(bad, tl.where(inputs_bad != 0, _INPUTS, _UNREPAIRED), _REPAIRED))
            tl.store(fields + 9, attempt + 1)
