"""Sums over the length of two tensors and of the products of their elements, in one pass over both where compiled.

The identities of attention's backward need a gradient and its product with what it is the gradient of. No thresholds,
no sites, no gradients.
"""

from __future__ import annotations

import torch

from resilience.kernels.sweep import sweep
from resilience.kernels.threads import gomp_parallel

try:
    from resilience.kernels import _products as _compiled
except ImportError:  # built without a C compiler
    _compiled = None  # type: ignore[assignment]

__all__ = ["NUM_WEIGHTS", "pair_sums"]

NUM_WEIGHTS = 4
"""Weight vectors of one pass."""

_GOMP_PARALLEL = gomp_parallel() if _compiled is not None else 0
_DTYPES = (torch.float32, torch.bfloat16)


def pair_sums(one: torch.Tensor, other: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Σ_t w_t·a_t, Σ_t w_t·b_t and Σ_t w_t·a_t·b_t for every other index; (3, 4, b, h, d) in float32.

    Args:
        one: a, (b, h, t, d); float32 or bfloat16.
        other: b, of the same shape and dtype, on the same device.
        weights: w, (t, 4), float32, each vector contiguous.

    Returns:
        Products and partial sums in float32; NaN and INF propagate. No gradient flows. The compiled kernel's bits
        depend on the length and the processor's instruction set, not on the number of threads.
    """
    if _compiled is not None and _fits(one) and _fits(other):
        return _compiled_sums(one, other, weights)
    batch, heads, length, width = one.shape
    with torch.no_grad():
        parts = []
        for terms in (one, other, one.float() * other.float()):
            columns = sweep(terms.reshape(batch * heads, length, width), left=weights).columns
            assert columns is not None
            parts.append(columns.view(batch, heads, width, NUM_WEIGHTS).movedim(-1, 0))
        return torch.stack(parts)


def _fits(operand: torch.Tensor) -> bool:
    return operand.is_cpu and operand.dtype in _DTYPES and not operand.is_neg() and operand.stride(3) == 1


def _compiled_sums(one: torch.Tensor, other: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    batch, heads, length, width = one.shape
    sums = torch.empty(3, NUM_WEIGHTS, batch, heads, width, dtype=torch.float32, device="cpu")
    shape, of_one, of_other = (batch, heads, length, width), one.stride()[:3], other.stride()[:3]
    if of_one[1] == of_other[1] == width:
        # Heads that lie side by side are read as they lie: whole rows.
        shape = (batch, 1, length, heads * width)
    _compiled.sums(
        shape,
        one.dtype is torch.bfloat16,
        one.data_ptr(),
        of_one,
        other.data_ptr(),
        of_other,
        weights.data_ptr(),
        sums.data_ptr(),
        _GOMP_PARALLEL,
        torch.get_num_threads(),
    )
    return sums
