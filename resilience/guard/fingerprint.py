"""A 64-bit fingerprint of a tensor's bytes and their order. No host synchronisation: the result is a tensor.

Two parts, each a sum modulo 2^64 of the elements (as integers of their own width) times an odd number drawn from their
place: a change of one element always changes the fingerprint, and swapped or cancelling changes do with probability
1 − 2^-63 or so. (`torch.hash_tensor` ignores order and lets two equal flips cancel.)
"""

from __future__ import annotations

import torch

__all__ = ["fingerprint"]

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 1 << 20
_GOLDEN = -7046029254386353131  # 2^64 ÷ the golden ratio, as a signed number
_MIX = -4658895280553007687  # the multiplier of splitmix64's first round


@torch.no_grad()
def fingerprint(tensor: torch.Tensor) -> torch.Tensor:
    """The fingerprint of `tensor` (any shape, strides and dtype of 1, 2, 4 or 8 bytes) as a 0-d int64 tensor."""
    flat = tensor.detach().contiguous().reshape(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat).reshape(-1)
    flat = flat.view(_INTEGERS[flat.element_size()])
    total = torch.full((), flat.numel(), dtype=torch.int64, device=flat.device)
    for start in range(0, flat.numel(), _CHUNK):
        part = flat[start : start + _CHUNK].to(torch.int64)
        place = torch.arange(start + 1, start + 1 + part.numel(), dtype=torch.int64, device=flat.device)
        weight = place * _GOLDEN
        weight = ((weight ^ (weight >> 29)) * _MIX) | 1
        total = total + (part * weight).sum()
    return total
