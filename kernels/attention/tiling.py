"""Tile sizes, warps and pipeline stages by head dimension and hardware. Pure.

Chosen from compilation ahead of time (registers, spills, shared memory: `scripts/test -m long -s -k every_tile
tests/kernels/test_attention_compiled.py`), not from measurements: none of this has run on a GPU yet.
"""

from __future__ import annotations

import dataclasses

__all__ = ["Launch", "Tiling", "padded", "tiling_for"]


@dataclasses.dataclass(frozen=True, slots=True)
class Launch:
    """One kernel's configuration. BLOCK_M counts queries, BLOCK_N keys."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Tiling:
    """Configurations of the three kernels."""

    forward: Launch
    dq: Launch
    dkdv: Launch
    num_columns: int
    """Width of a block of checksum columns: the narrowest that the matrix unit takes."""


def padded(head_dim: int) -> int:
    """The power of two that a head dimension is padded to in registers, at least 16."""
    return max(16, 1 << (head_dim - 1).bit_length())


_SM90 = {
    64: Tiling(forward=Launch(128, 64, 4, 3), dq=Launch(128, 64, 8, 2), dkdv=Launch(64, 128, 8, 2), num_columns=8),
    128: Tiling(forward=Launch(128, 64, 8, 3), dq=Launch(128, 64, 8, 2), dkdv=Launch(32, 128, 8, 2), num_columns=8),
    256: Tiling(forward=Launch(128, 32, 8, 2), dq=Launch(64, 32, 8, 2), dkdv=Launch(16, 64, 8, 2), num_columns=8),
}
_SM80 = {
    64: Tiling(forward=Launch(128, 64, 4, 3), dq=Launch(128, 64, 8, 2), dkdv=Launch(32, 128, 8, 2), num_columns=8),
    128: Tiling(forward=Launch(128, 64, 8, 2), dq=Launch(128, 32, 8, 2), dkdv=Launch(16, 128, 8, 2), num_columns=8),
    256: Tiling(forward=Launch(64, 32, 8, 2), dq=Launch(64, 32, 8, 2), dkdv=Launch(16, 64, 8, 2), num_columns=8),
}
_HIP = {
    64: Tiling(forward=Launch(128, 64, 4, 1), dq=Launch(64, 64, 4, 1), dkdv=Launch(32, 64, 4, 1), num_columns=16),
    128: Tiling(forward=Launch(128, 64, 4, 1), dq=Launch(64, 32, 4, 1), dkdv=Launch(32, 64, 4, 1), num_columns=16),
    256: Tiling(forward=Launch(64, 32, 4, 1), dq=Launch(32, 32, 4, 1), dkdv=Launch(32, 32, 4, 1), num_columns=16),
}


def tiling_for(head_dim: int, backend: str, capability: int) -> Tiling:
    """Configuration for a head dimension up to 256.

    Args:
        head_dim: of q, k and v.
        backend: `cuda` or `hip`.
        capability: 80, 90, … on CUDA; ignored elsewhere.
    """
    table = _HIP if backend == "hip" else _SM90 if capability in (90, 100, 103) else _SM80
    return table[max(64, padded(head_dim))]
