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
_DTYPES = (torch.float32, torch.bfloat16)


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
    batch, heads, length, width = one.shape
    if _compiled is not None and _fits(one) and _fits(other) and one.dtype is other.dtype:
        sums = torch.empty(3, NUM_WEIGHTS, batch, heads, width, dtype=torch.float32, device="cpu")
        shape, strides = _as_it_lies(one, other)
        _compiled.sums(
            shape,
            one.dtype is torch.bfloat16,
            one.data_ptr(),
            strides[0],
            other.data_ptr(),
            strides[1],
            weights.data_ptr(),
            sums.data_ptr(),
            _GOMP_PARALLEL,
            torch.get_num_threads(),
        )
        return sums
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
    batch, heads, length, width = operand.shape
    if _compiled is not None and _fits(operand):
        found = torch.empty(NUM_WEIGHTS + 1, batch, heads, width, dtype=torch.float32, device="cpu")
        shape, (strides,) = _as_it_lies(operand)
        _compiled.moments(
            shape,
            operand.dtype is torch.bfloat16,
            operand.data_ptr(),
            strides,
            weights.data_ptr(),
            found.data_ptr(),
            _GOMP_PARALLEL,
            torch.get_num_threads(),
        )
        return found
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
    if _compiled is not None and _fits(operand):
        batch, heads, _, width = operand.shape
        found = torch.empty(2, batch, heads, width, dtype=torch.float32, device="cpu")
        shape, (strides,) = _as_it_lies(operand)
        _compiled.extremes(
            shape,
            operand.dtype is torch.bfloat16,
            operand.data_ptr(),
            strides,
            found.data_ptr(),
            _GOMP_PARALLEL,
            torch.get_num_threads(),
        )
        return found
    operand = operand.detach()
    found = torch.stack([operand.amin(2), operand.amax(2)]).to(torch.promote_types(operand.dtype, torch.float32))
    return found + (found * 0.0).sum(0)


def _fits(operand: torch.Tensor) -> bool:
    is_known = operand.is_cpu and operand.dtype in _DTYPES and not operand.is_neg()
    return is_known and operand.stride(3) == 1 and operand.numel() > 0


def _as_it_lies(*operands: torch.Tensor) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """Shape (outer, inner, length, width) and the strides of the first three: heads that lie side by side in every
    operand are read as whole rows.
    """
    batch, heads, length, width = operands[0].shape
    strides = [operand.stride()[:3] for operand in operands]
    if all(by_head == width for _, by_head, _ in strides):
        return (batch, 1, length, heads * width), [(by_batch, 0, by_row) for by_batch, _, by_row in strides]
    return (batch, heads, length, width), strides
