"""The Triton kernel of the hash and its launch: one pass over the words, one partial sum a program.

Integer arithmetic only, so neither order nor device matter. README.md has the definition.
"""

# Triton has no types, and reads arguments of kernels by its own rules.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl

__all__ = ["BLOCK", "hash_kernel", "hash_words"]

_MASK: tl.constexpr = tl.constexpr(0x7FFFFFFF)
_FIRST: tl.constexpr = tl.constexpr(0x45D9F3B1)
_SECOND: tl.constexpr = tl.constexpr(0x2C1B3C6D)
_THIRD: tl.constexpr = tl.constexpr(0x297A2D39)
_FOURTH: tl.constexpr = tl.constexpr(0x1B56C4E9)

BLOCK = 1024
"""Words that four warps read at once: two loads of 16 bytes a thread."""

_NUM_PROGRAMS = 4096
"""Programs aimed at: enough for every multiprocessor of the largest GPUs."""

_MIN_BLOCKS = 4
"""Blocks a program at least takes."""


@triton.jit
def _weight(start, lanes):
    """K of the positions start + lanes, as its lower and upper 32 bits.

    31-bit numbers in unsigned 32-bit arithmetic, so that shifts bring in zeros; only `start` has 64 bits.
    """
    low = (start & _MASK).to(tl.uint32) + lanes.to(tl.uint32)
    high = (start >> 31).to(tl.uint32) + (low >> 31)
    mixed = low & _MASK
    mixed ^= mixed >> 16
    mixed = (mixed * _FIRST) & _MASK
    mixed ^= mixed >> 15
    mixed = (mixed * _SECOND) & _MASK
    mixed ^= mixed >> 16
    upper = (mixed * _THIRD) & _MASK
    upper ^= upper >> 14
    upper ^= (high * _FOURTH) & _MASK
    upper = (upper * _FOURTH) & _MASK
    return (mixed << 2) + 1, (upper << 1) + (mixed >> 30)


@triton.jit(do_not_specialize=["num_words", "offset", "blocks_per_program", "fault_word", "fault_bits"])
def hash_kernel(
    words,
    parts,
    num_words,
    offset,
    blocks_per_program,
    fault_word,
    fault_bits,
    INJECT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Partial hash of the blocks that the program's number stands for.

    Reads `words`, (num_words,) int32, contiguous, the first at position `offset`. Writes parts, (programs,) int64. With
    INJECT, a load of the word `fault_word` gives it with `fault_bits` flipped.
    """
    program = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    # A product of a word and K modulo 2^64 is w·lower + 2^32·(w·upper): two multiply-adds into two sums.
    lower_sum = tl.zeros((BLOCK,), tl.uint64)
    upper_sum = tl.zeros((BLOCK,), tl.uint32)
    for block in range(blocks_per_program):
        start = (program.to(tl.int64) * blocks_per_program + block) * BLOCK
        if start + BLOCK <= num_words:
            word = tl.load(words + start + lanes)  # no mask, hence 16 bytes at a time
        else:
            word = tl.load(words + start + lanes, mask=start + lanes < num_words, other=0)
        if INJECT:
            word = tl.where(start + lanes == fault_word, word ^ fault_bits, word)
        word = word.to(tl.uint32, bitcast=True)
        lower, upper = _weight(start + offset, lanes)
        lower_sum += word.to(tl.uint64) * lower.to(tl.uint64)
        upper_sum += word * upper
    total = lower_sum + (upper_sum.to(tl.uint64) << 32)
    tl.store(parts + program, tl.sum(total, axis=0).to(tl.int64, bitcast=True))


def hash_words(words: torch.Tensor, offset: int = 0, *, fault: tuple[int, int] | None = None) -> torch.Tensor:
    """Hash of words that lie on the device.

    Args:
        words: (number of words,) int32, contiguous.
        offset: position of the first one.
        fault: (index, bits to flip) of a word that the kernel shall read wrongly; compiles a kernel of its own.

    Returns:
        int64 scalar on the device of `words`; nothing waits for it.
    """
    num_words = words.numel()
    if num_words == 0:
        return words.new_zeros((), dtype=torch.int64)
    num_blocks = triton.cdiv(num_words, BLOCK)
    blocks_per_program = max(_MIN_BLOCKS, triton.cdiv(num_blocks, _NUM_PROGRAMS))
    num_programs = triton.cdiv(num_blocks, blocks_per_program)
    parts = torch.empty(num_programs, dtype=torch.int64, device=words.device)
    fault_word, fault_bits = fault or (0, 0)
    hash_kernel[(num_programs,)](
        words,
        parts,
        num_words,
        offset,
        blocks_per_program,
        fault_word,
        fault_bits,
        INJECT=fault is not None,
        BLOCK=BLOCK,
        num_warps=4,
    )
    return parts.sum()
