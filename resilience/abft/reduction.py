"""A reduction over ranks, held by sums: those of the result are the reduced sums of what went in. Pure.

y = Σ_r x_r, over W ranks, is cut into chunks of `CHUNK` elements. With the checksum vectors V of `sums.vectors` a chunk
of y has the sums Vᵀ·y = Σ_r Vᵀ·x_r, and Σ_r ‖x_r‖² is estimated by the squares of the same sums. What round-off may do:
each of W − 1 additions rounds a partial sum, which is at most W times as large as an x_r.
"""

from __future__ import annotations

import torch

from resilience.abft.sums import sums_of, vectors

__all__ = ["CHUNK", "chunk_sums", "may_overflow", "reduction_ratio"]

CHUNK = 16_384
"""Elements of a chunk: an error is seen from about the root of that many round-offs on."""

_TINY = 1e-36

_NORM_MARGIN = 16.0
"""By how much a norm may be larger than its estimate from two sums."""


def chunk_sums(shards: torch.Tensor) -> torch.Tensor:
    """Sums of every chunk of every shard; (s, chunks, c) in float64, on its device.

    Args:
        shards: (s, n), not empty; float32, float64, bfloat16 or float16.
    """
    shards = shards.detach()
    num_whole, rest = divmod(shards.shape[1], CHUNK)
    parts = []
    if num_whole:
        whole = shards[:, : num_whole * CHUNK].view(-1, num_whole, CHUNK)
        parts.append(sums_of(whole, right=vectors(CHUNK, shards)).rows)
    if rest:
        parts.append(sums_of(shards[:, num_whole * CHUNK :].unsqueeze(1), right=vectors(rest, shards)).rows)
    return torch.cat([part.double() for part in parts if part is not None], dim=1)


def reduction_ratio(
    expected: torch.Tensor, energy: torch.Tensor, observed: torch.Tensor, *, dtype: torch.dtype, num_ranks: int
) -> torch.Tensor:
    """Residual ÷ tolerance of every chunk, (chunks,); NaN where a sum is not finite.

    Args:
        expected: Σ_r of `chunk_sums` of what went in, (chunks, c).
        energy: Σ_r of the mean square of a chunk's sums, (chunks,).
        observed: `chunk_sums` of the result.
        dtype: in which the ranks' parts are added.
        num_ranks: W.
    """
    summed = 8.0 * torch.finfo(torch.float32).eps / 2
    factor = 8.0 * (num_ranks * torch.finfo(dtype).eps / 2 + summed)
    tolerance = factor * factor * (energy + energy.mean()) + _TINY
    return ((expected - observed).square().mean(-1) / tolerance).sqrt()


def may_overflow(energy: torch.Tensor, *, dtype: torch.dtype, num_ranks: int) -> bool:
    """Whether adding may have left the range of `dtype` without any fault: no element of y is larger than √(W·Σ‖x_r‖²).

    The arguments are those of `reduction_ratio`.
    """
    return _NORM_MARGIN * float((num_ranks * energy.max()).sqrt()) >= torch.finfo(dtype).max
