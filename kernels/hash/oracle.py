"""The hash of a tensor's bits as its definition reads: one word after the other, in Python's integers.

What every other form is tested against. Slow by intent; imports nothing.
"""

from __future__ import annotations

__all__ = ["bit_hash", "weight"]

MASK = (1 << 31) - 1


def weight(position: int) -> int:
    """K of the word at `position`, an odd number below 2^64."""
    mixed = position & MASK
    mixed ^= mixed >> 16
    mixed = mixed * 0x45D9F3B1 & MASK
    mixed ^= mixed >> 15
    mixed = mixed * 0x2C1B3C6D & MASK
    mixed ^= mixed >> 16
    upper = mixed * 0x297A2D39 & MASK
    upper ^= upper >> 14
    upper ^= (position >> 31) * 0x1B56C4E9 & MASK
    upper = upper * 0x1B56C4E9 & MASK
    return 1 + 4 * mixed + (upper << 33)


def bit_hash(memory: bytes, *, offset: int = 0) -> int:
    """Hash of `memory`, read as little-endian words of four bytes, the first at position `offset`.

    Returns:
        A number of 0 … 2^64 − 1.
    """
    total = 0
    for start in range(0, len(memory), 4):
        word = int.from_bytes(memory[start : start + 4], "little")
        total += word * weight(offset + start // 4)
    return total % (1 << 64)
