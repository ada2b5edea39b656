"""A reduction over ranks, held by sums: those of the result are the reduced sums of what went in. Pure.

y = Σ_r x_r, over W ranks, is cut into chunks of `CHUNK` elements. With the checksum vectors V of `sums.vectors` a chunk
of y has the sums Vᵀ·y = Σ_r Vᵀ·x_r. Each of W − 1 additions rounds a partial sum S_k by up to u·|S_k|, and Σ_k ‖S_k‖²
is about W·E ÷ 2 for independent parts and W·‖y‖² ÷ 3 for equal ones, with E = Σ_r ‖x_r‖². Both norms are taken exactly:
an estimate from a few sums is too low now and then, and would be as low in every replay.
"""

from __future__ import annotations

import torch

from resilience.abft.sums import sums_of, vectors
from resilience.kernels.lengthwise import NUM_WEIGHTS, pair_sums

__all__ = ["CHUNK", "chunk_energies", "chunk_sums", "may_overflow", "reduction_ratio"]

CHUNK = 16_384
"""Elements of a chunk: an error is seen from about the root of that many round-offs on."""

_SIDE = 128
"""Of a square into which a chunk folds."""

_TINY = 1e-36


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


def chunk_energies(shards: torch.Tensor) -> torch.Tensor:
    """‖x‖² of every chunk of every shard; (s, chunks) in float64, on its device. Arguments: see `chunk_sums`."""
    shards = shards.detach()
    wide = torch.promote_types(shards.dtype, torch.float32)
    num_whole, rest = divmod(shards.shape[1], CHUNK)
    parts = []
    if num_whole:
        whole = shards[:, : num_whole * CHUNK].view(-1, num_whole, CHUNK)
        if whole.is_cpu and whole.dtype == torch.bfloat16:  # torch's norm takes ten times as long as the sums
            parts.append(_squares(whole))
        else:
            parts.append(torch.linalg.vector_norm(whole, dim=2, dtype=wide).double().square())
    if rest:
        norms = torch.linalg.vector_norm(shards[:, num_whole * CHUNK :], dim=1, dtype=wide)
        parts.append(norms.double().square().unsqueeze(1))
    return torch.cat(parts, dim=1)


def _squares(chunks: torch.Tensor) -> torch.Tensor:
    """Σ x² over the last dimension, (s, n, CHUNK) to (s, n), in float64 of sums in float32."""
    squares = chunks.unflatten(-1, (_SIDE, CHUNK // _SIDE))
    _, _, of_products = pair_sums(squares, squares, torch.ones(NUM_WEIGHTS, _SIDE, device="cpu").T)
    return of_products[0].double().sum(-1)


def reduction_ratio(
    expected: torch.Tensor,
    energy: torch.Tensor,
    observed: torch.Tensor,
    observed_energy: torch.Tensor,
    *,
    dtype: torch.dtype,
    num_ranks: int,
) -> torch.Tensor:
    """Residual ÷ tolerance of every chunk, (chunks,); NaN where a sum is not finite.

    Args:
        expected: Σ_r of `chunk_sums` of what went in, (chunks, c).
        energy: E, Σ_r of its `chunk_energies`, (chunks,).
        observed: `chunk_sums` of the result y.
        observed_energy: ‖y‖², its `chunk_energies`: a fault widens its own tolerance by a factor far below 1.
        dtype: in which the ranks' parts are added.
        num_ranks: W.
    """
    added, summed = 8.0 * torch.finfo(dtype).eps / 2, 64.0 * torch.finfo(torch.float32).eps / 2
    # No result is larger than √(W·E): what is near the largest number must not hide behind its own square.
    size = energy + torch.minimum(observed_energy.nan_to_num(nan=torch.inf), num_ranks * energy)
    tolerance = (added * added * num_ranks + summed * summed) * size + _TINY
    return ((expected - observed).square().mean(-1) / tolerance).sqrt()


def may_overflow(energy: torch.Tensor, *, dtype: torch.dtype, num_ranks: int) -> bool:
    """Whether adding may have left the range of `dtype` without any fault: no element of y is larger than √(W·E).

    Args:
        energy: see `reduction_ratio`.
        dtype: see there.
        num_ranks: see there.
    """
    grown = 1.0 + num_ranks * torch.finfo(dtype).eps
    return grown * float((num_ranks * energy.max()).sqrt()) >= torch.finfo(dtype).max
