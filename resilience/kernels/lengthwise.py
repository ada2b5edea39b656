"""What is taken over the length of operands (b, h, t, d), compiled where it could be: sums of two tensors and of the
products of their elements in one pass over both, sums of one with those of its squares, and extremes.

The identities of attention's backward need a gradient and its product with what it is the gradient of, those of its
forward the range of V; reductions over ranks need sums and norms. No thresholds, no sites, no gradients.
"""

from __future__ import annotations

import torch

from resilience.kernels.sweep import sweep
from resilience.kernels.threads import gomp_parallel

try:
    from resilience.kernels import _lengthwise as _compiled
except ImportError:  # built without a C compiler
    _compiled = None  # type: ignore[assignment]

__all__ = ["NUM_WEIGHTS", "extremes", "moments", "pair_sums"]

NUM_WEIGHTS = 4
"""Weight vectors of one pass."""

_GOMP_PARALLEL = gomp_parallel() if _compiled is not None else 0


def pair_sums(one: torch.Tensor, other: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Σ_t w_t·a_t, Σ_t w_t·b_t and Σ_t w_t·a_t·b_t for every other index; (3, 4, b, h, d) in float32.

    Args:
        one: a, (b, h, t, d), not empty; float32 or bfloat16.
        other: b, of the same shape and dtype, on the same device.
        weights: w, (t, 4), float32, each vector contiguous.

    Returns:
        Products and partial sums in float32; NaN and INF propagate. No gradient flows. The compiled kernel's bits
        depend on the length and the processor's instruction set, not on the number of threads.
    """
    if _compiled is not None and not one.is_neg() and not other.is_neg():
        found = _compiled.sums(one, other, weights, _GOMP_PARALLEL, torch.get_num_threads())
        if found is not None:
            return found
    batch, heads, length, width = one.shape
    parts = []
    with torch.no_grad():
        for terms in (one, other, one.float() * other.float()):
            columns = sweep(terms.reshape(batch * heads, length, width), left=weights).columns
            assert columns is not None
            parts.append(columns.view(batch, heads, width, NUM_WEIGHTS).movedim(-1, 0))
    return torch.stack(parts)


def moments(operand: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Σ_t w_t·a_t under each weight vector, and Σ_t a_t², for every other index; (5, b, h, d) in float32 or wider.

    Args:
        operand: a, (b, h, t, d), not empty; float32, float64, bfloat16 or float16.
        weights: w, (t, 4), float32, each vector contiguous.
    """
    if _compiled is not None and not operand.is_neg():
        found = _compiled.moments(operand, weights, _GOMP_PARALLEL, torch.get_num_threads())
        if found is not None:
            return found
    batch, heads, length, width = operand.shape
    operand = operand.detach().reshape(batch * heads, length, width)
    if operand.dtype == torch.float64:
        columns = operand.mT @ weights.double()
    else:
        swept = sweep(operand.float() if operand.is_cpu else operand, left=weights).columns
        assert swept is not None
        columns = swept
    squares = torch.linalg.vector_norm(operand, dim=1, dtype=columns.dtype).square()
    return torch.cat([columns.movedim(-1, 0), squares.unsqueeze(0)]).view(NUM_WEIGHTS + 1, batch, heads, width)


def extremes(operand: torch.Tensor) -> torch.Tensor:
    """Smallest and largest of every component over the length, (2, b, h, d), in float32 or wider; NaN where one of its
    elements is not finite. `operand`: (b, h, t, d), not empty. No gradient flows.
    """
    if _compiled is not None and not operand.is_neg():
        found = _compiled.extremes(operand, _GOMP_PARALLEL, torch.get_num_threads())
        if found is not None:
            return found
    operand = operand.detach()
    both = torch.stack([operand.amin(2), operand.amax(2)]).to(torch.promote_types(operand.dtype, torch.float32))
    return both + (both * 0.0).sum(0)
