"""Products with a mask for an addend, as torch's MultiheadAttention makes them: C = alpha·A·B + beta·D, D of −∞ or so.

Where D swallows elements of A·B, the sums of a row say nothing about the others. So the product is computed once more
with 0 in their places, and that one's sums are checked; of C, what is swallowed must be beta·D, and all else have the
bits of the second product. A fault in either of them makes them differ.
"""

from __future__ import annotations

import dataclasses
import math

import torch

from resilience.abft.checksum import worst_residual
from resilience.abft.expectation import Expectation, swallowing
from resilience.abft.gemm import Gemm
from resilience.abft.sums import addend_sums

__all__ = ["worst_under_mask"]


def worst_under_mask(expectation: Expectation, out: torch.Tensor, *, factor_scale: float = 1.0) -> float:
    """The largest residual ÷ tolerance of C = `out`; infinite where it differs from the second product.

    Args:
        expectation: `is_masked`.
        out: C.
        factor_scale: on the tolerance.
    """
    gemm, addend = expectation.call, expectation.call.addend
    assert addend is not None
    mask = swallowing(addend)
    filled = addend.masked_fill(mask, 0.0)
    bare = dataclasses.replace(gemm, addend=filled)
    again = _product(bare, filled)
    if not torch.equal(torch.where(mask, gemm.beta * addend, again), out):
        return math.inf
    found = Expectation(bare, False, expectation.product, addend_sums(filled, out))
    return worst_residual(found, again, factor_scale=factor_scale)


def _product(gemm: Gemm, addend: torch.Tensor) -> torch.Tensor:
    compute = torch.addmm if gemm.left.dim() == 2 else torch.baddbmm
    # Autocast does not touch products in place: it would round this one, and keep a weight for the script's next
    # products that autograd does not know.
    with torch.no_grad(), torch.autocast(gemm.left.device.type, enabled=False):
        return compute(addend, gemm.left, gemm.right, beta=gemm.beta, alpha=gemm.alpha)
