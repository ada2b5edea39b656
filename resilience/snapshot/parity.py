"""Parity of blocks of equal length, and blocks rebuilt from what is left. Bytes in, bytes out: no disk, no network.

One loss is made up for by XOR (numpy). More take a Reed–Solomon code over GF(2⁸) with a Cauchy matrix, of which every
square part can be inverted, so that *any* m of the k + m blocks may be missing (ISA-L, by way of pyeclib). The oracle
of that code, in plain Python, is `naive_parity`.

A code knows nothing of damage: a block whose digest differs must be left out, as if it were lost.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyeclib.ec_iface

from resilience.snapshot.groups import MAX_MEMBERS

__all__ = ["Code", "naive_parity"]

Buffer = bytes | bytearray | memoryview

_HEADER_BYTES = 80
"""What pyeclib puts before each block; it depends on the code and the length only, for no checksum is asked for."""


class Code:
    """Parity for `num_data` blocks that makes up for `losses` missing ones."""

    def __init__(self, num_data: int, losses: int) -> None:
        """A code.

        Raises:
            ValueError: there is none with these numbers.
        """
        if num_data < 1 or losses < 1 or num_data + losses > MAX_MEMBERS:
            raise ValueError(
                f"parity over {num_data} blocks for {losses} losses: both must be at least 1, "
                f"and {MAX_MEMBERS} together at most"
            )
        self.num_data = num_data
        self.losses = losses

    def encode(self, data: Sequence[Buffer]) -> list[bytes]:
        """The parity blocks of these data blocks.

        Args:
            data: `num_data` blocks of one length.

        Returns:
            `losses` blocks of that length.
        """
        length = self._length(data)
        if self.losses == 1:
            return [_xor(data)]
        if not length:
            return [b""] * self.losses
        fragments = _driver(self.num_data, self.losses).encode(b"".join(data))
        return [fragment[_HEADER_BYTES:] for fragment in fragments[self.num_data :]]

    def rebuild(self, blocks: Mapping[int, Buffer], wanted: int) -> bytes:
        """A missing block of a stripe.

        Args:
            blocks: index → block, at least `num_data` of them: data blocks from 0, then the parity blocks.
            wanted: the index of the block to make.

        Raises:
            ValueError: there are too few blocks.
        """
        if wanted in blocks:
            return bytes(blocks[wanted])
        if len(blocks) < self.num_data:
            raise ValueError(f"{len(blocks)} blocks of a stripe are left; {self.num_data} are needed")
        used = dict(sorted(blocks.items())[: self.num_data])
        length = self._length(list(used.values()))
        if self.losses == 1:
            return _xor(list(used.values()))
        if not length:
            return b""
        headers = _headers(self.num_data, self.losses, length)
        fragments = [headers[index] + bytes(block) for index, block in used.items()]
        rebuilt = _driver(self.num_data, self.losses).reconstruct(fragments, [wanted])
        return bytes(memoryview(rebuilt[0])[_HEADER_BYTES:])

    def _length(self, blocks: Sequence[Buffer]) -> int:
        lengths = {len(block) for block in blocks}
        if len(blocks) != self.num_data or len(lengths) != 1:
            raise ValueError(f"{len(blocks)} blocks of {sorted(lengths)} bytes; {self.num_data} of one length needed")
        return lengths.pop()


def naive_parity(data: Sequence[Buffer], losses: int) -> list[bytes]:
    """What `Code.encode` must give for two losses and more: Σ_j (k + i ⊕ j)⁻¹ · d_j for parity block i. The oracle."""
    rows = [[_inverse((len(data) + i) ^ j) for j in range(len(data))] for i in range(losses)]
    columns = list(zip(*data, strict=True))
    return [bytes(functools.reduce(int.__xor__, map(_product, row, column)) for column in columns) for row in rows]


def _product(a: int, b: int) -> int:
    """In GF(2⁸), modulo x⁸ + x⁴ + x³ + x² + 1."""
    result = 0
    while b:
        if b & 1:
            result ^= a
        a = (a << 1) ^ (0x11D if a & 0x80 else 0)
        b >>= 1
    return result


@functools.cache
def _inverse(a: int) -> int:
    return next(b for b in range(1, 256) if _product(a, b) == 1)


def _xor(blocks: Sequence[Buffer]) -> bytes:
    if len(blocks) == 1:
        return bytes(blocks[0])
    total = np.bitwise_xor(np.frombuffer(blocks[0], np.uint8), np.frombuffer(blocks[1], np.uint8))
    for block in blocks[2:]:
        np.bitwise_xor(total, np.frombuffer(block, np.uint8), out=total)
    return total.tobytes()


@functools.cache
def _driver(num_data: int, losses: int) -> Any:
    return pyeclib.ec_iface.ECDriver(k=num_data, m=losses, ec_type="isa_l_rs_cauchy")


@functools.lru_cache(maxsize=8)
def _headers(num_data: int, losses: int, length: int) -> list[bytes]:
    """The header of each block of this length."""
    return [fragment[:_HEADER_BYTES] for fragment in _driver(num_data, losses).encode(bytes(num_data * length))]
