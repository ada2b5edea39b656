"""Which bytes are hashed at which step, and whom a vote among replicas names. Pure: numbers in, numbers out.

The bytes of all tensors, one behind the other, are divided into ⌈1 ÷ share⌉ slices of equal size that take turns, so
that within so many steps each byte is hashed exactly once (and with a share of 1 at every step).
"""

from __future__ import annotations

import collections
import math
from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["GRAIN_BYTES", "Piece", "Supply", "cover", "odd_ones_out", "period", "pieces"]

GRAIN_BYTES = 64
"""Pieces begin at multiples of this within their tensor: whole words of the hash, whole lines of a cache."""

_PIECE_BYTES_MAX = 1 << 22
"""What a rebuild sends at most for one difference."""


class Piece(NamedTuple):
    """Bytes `start` … `stop` − 1 of one tensor."""

    tensor: int
    """Its place among the tensors."""
    start: int
    stop: int


def period(share: float) -> int:
    """Steps until each byte has had its turn; 0 where nothing is ever checked."""
    return math.ceil(1 / share - 1e-9) if share > 0 else 0


def pieces(sizes: Sequence[int], share: float, step: int) -> list[Piece]:
    """What is hashed at `step`, in the order of the tensors.

    Args:
        sizes: bytes of each tensor.
        share: of all bytes, from 0 to 1; what a step hashes differs from it by rounding up to a whole number of turns.
        step: any number that grows by one.
    """
    turns = period(share)
    if not turns:
        return []
    total, turn = sum(sizes), step % turns
    first, last = total * turn // turns, total * (turn + 1) // turns
    found: list[Piece] = []
    begin = 0
    for tensor, size in enumerate(sizes):
        start, stop = (_aligned(edge - begin, size) for edge in (first, last))
        found += [Piece(tensor, at, min(at + _PIECE_BYTES_MAX, stop)) for at in range(start, stop, _PIECE_BYTES_MAX)]
        begin += size
    return found


def _aligned(edge: int, size: int) -> int:
    """A slice's edge within a tensor; neighbouring slices round alike, so that nothing is left out between them."""
    return size if edge >= size else max(0, edge) // GRAIN_BYTES * GRAIN_BYTES


def odd_ones_out(values: Sequence[int | None]) -> tuple[int, ...]:
    """Ranks whose value is not that of more than half of the ranks; empty where all agree or no value has a majority.

    Args:
        values: by rank; None for a rank that has none.
    """
    held = [value for value in values if value is not None]
    if not held:
        return ()
    value, count = collections.Counter(held).most_common(1)[0]
    if 2 * count <= len(held):
        return ()
    return tuple(rank for rank, own in enumerate(values) if own is not None and own != value)


class Supply(NamedTuple):
    """Elements `start` … `stop` − 1 of a parameter, which a rank can give."""

    rank: int
    start: int
    stop: int
    priority: int
    """Lower ones are taken first."""
    source: str = ""
    """Name of the tensor that they come from."""


def cover(start: int, stop: int, supplies: Sequence[Supply]) -> list[Supply] | None:
    """Who gives which elements so that `start` … `stop` − 1 are there once each, in order; None if some are missing.

    Args:
        start: first element.
        stop: one past the last.
        supplies: all that is offered; of equal priority the earlier one in this order is taken.
    """
    missing = [(start, stop)] if start < stop else []
    taken: list[Supply] = []
    for supply in sorted(supplies, key=lambda offer: offer.priority):
        left: list[tuple[int, int]] = []
        for first, last in missing:
            low, high = max(first, supply.start), min(last, supply.stop)
            if low >= high:
                left.append((first, last))
                continue
            taken.append(supply._replace(start=low, stop=high))
            left += [gap for gap in ((first, low), (high, last)) if gap[0] < gap[1]]
        missing = left
    return None if missing else sorted(taken, key=lambda part: part.start)
