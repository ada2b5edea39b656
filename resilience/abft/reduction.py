"""A reduction over ranks, held by sums: those of the result are the reduced sums of what went in. Pure.

y = Σ_r x_r, over W ranks, is cut into chunks of `CHUNK` elements, each folded into a matrix (t, d). With the weights V
of `sums.vectors`, signed, plain and by position, a chunk of y has the sums Σ_td V_tc·V_dc·y_td = Σ_r of those of x_r.
Each of W − 1 additions rounds a partial sum S_k by up to u·|S_k|, and Σ_k ‖S_k‖² is about W·E ÷ 2 for independent parts
and W·‖y‖² ÷ 3 for equal ones, with E = Σ_r ‖x_r‖². Both norms are taken exactly: an estimate from a few sums is too low
now and then, and would be as low in every replay.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from resilience.abft.sums import vectors
from resilience.kernels.lengthwise import moments

__all__ = ["CHUNK", "ChunkSums", "chunk_sums", "may_overflow", "reduction_ratio"]

_LENGTH, _WIDTH = 1024, 16

CHUNK = _LENGTH * _WIDTH
"""Elements of a chunk: an error is seen from about the root of that many round-offs on."""

_TINY = 1e-36


class ChunkSums(NamedTuple):
    """Of the chunks of one or more shards, in float64."""

    sums: torch.Tensor
    """(…, chunks, c)"""
    energies: torch.Tensor
    """‖x‖², (…, chunks)."""

    def is_finite(self) -> bool:
        """Whether all of them are. Waits for the device."""
        return bool(self.sums.isfinite().all() and self.energies.isfinite().all())


def chunk_sums(shards: torch.Tensor) -> ChunkSums:
    """Sums of every chunk of every shard, on its device.

    Args:
        shards: (s, n), not empty, each contiguous; float32, float64, bfloat16 or float16.
    """
    shards = shards.detach()
    num_whole, rest = divmod(shards.shape[1], CHUNK)
    parts = []
    if num_whole:
        parts.append(_sums_of_folded(shards[:, : num_whole * CHUNK].view(-1, num_whole, _LENGTH, _WIDTH)))
    if rest:
        filled = torch.nn.functional.pad(shards[:, num_whole * CHUNK :], (0, -rest % _WIDTH))
        parts.append(_sums_of_folded(filled.view(len(shards), 1, -1, _WIDTH)))
    return ChunkSums(torch.cat([part.sums for part in parts], 1), torch.cat([part.energies for part in parts], 1))


def _sums_of_folded(chunks: torch.Tensor) -> ChunkSums:
    """Of chunks that are folded, (s, chunks, t, d)."""
    *sums, squares = moments(chunks, _weights(chunks.shape[2], chunks.device)).double()
    weighted = torch.stack(sums, -1) * _weights(_WIDTH, chunks.device).double()  # (s, chunks, d, c)
    return ChunkSums(weighted.sum(2), squares.sum(2))


@functools.lru_cache(maxsize=2 * _LENGTH)
def _weights(length: int, device: torch.device) -> torch.Tensor:
    """(length, c), each vector contiguous; as many for every dtype."""
    return vectors(length, torch.empty(0, dtype=torch.bfloat16, device=device))


def reduction_ratio(expected: ChunkSums, result: ChunkSums, *, dtype: torch.dtype, num_ranks: int) -> torch.Tensor:
    """Residual ÷ tolerance of every chunk, (chunks,); NaN where a sum is not finite.

    Args:
        expected: of a shard of what went in, added up over the ranks: (chunks, c) and E, (chunks,).
        result: of that shard of y. A fault widens its own tolerance by a factor far below 1.
        dtype: in which the ranks' parts are added.
        num_ranks: W.
    """
    added, summed = 8.0 * torch.finfo(dtype).eps / 2, 64.0 * torch.finfo(torch.float32).eps / 2
    # No result is larger than √(W·E): what is near the largest number must not hide behind its own square.
    size = expected.energies + torch.minimum(result.energies.nan_to_num(nan=torch.inf), num_ranks * expected.energies)
    tolerance = (added * added * num_ranks + summed * summed) * size + _TINY
    return ((expected.sums - result.sums).square().mean(-1) / tolerance).sqrt()


def may_overflow(expected: ChunkSums, *, dtype: torch.dtype, num_ranks: int) -> bool:
    """Whether adding may have left the range of `dtype` without any fault: no element of y is larger than √(W·E).

    Args:
        expected: see `reduction_ratio`.
        dtype: see there.
        num_ranks: see there.
    """
    grown = 1.0 + num_ranks * torch.finfo(dtype).eps
    return grown * float((num_ranks * expected.energies.max()).sqrt()) >= torch.finfo(dtype).max
