"""Attention computed again in float64: the second stage behind the identities of `invariants.py`.

An identity sees a whole head at once, under a tolerance that is measured and not proved. Where the same call fails it
again, each element of what was computed is held here against a bound of round-off, as `checksum.confirm` does for
products. It costs ten times what the call did, and some ten matrices of `_AT_ONCE` elements: it is for suspicions that
stay. Where rows are too uncertain (their scores, or finite masks by which they see no key, are so large that round-off
changes P by a tenth) nothing is explained: their part in dK and dV would hide whatever is there. Where finite operands
leave the range of the arithmetic itself (float32's, by a sum of absolute terms) there is no evidence about the device:
a row of scores that may overflow is left out, with the dK and dV it adds to; of a row whose dP may, or whose dS may
leave the stored dtype, what is not finite.

Shapes: query, out, d_query, d_out (b, hq, tq, d); key, value and their gradients (b, hk, tk, d), hq a multiple of hk.
With S the scores, u_acc the round-off of the accumulation (float32), u that of the stored dtype, M_ij the sum of the
absolute terms of dS_ij ÷ P_ij, that is Σ_c |dO_ic V_jc| + Σ_c |dO_ic O_ic|:

    ε_i = u_acc·(16·max_j |S_ij| + 8·√(tk + d) + 32) + 8·u             relative error of what depends on row i
    |ΔO_ic| ≤ Σ_j ε_i P_ij |V_jc|                    |ΔdV_jc| ≤ Σ_i ε_i P_ij |dO_ic|
    |ΔdQ_ic| ≤ scale Σ_j ε_i P_ij M_ij |K_jc|        |ΔdK_jc| ≤ scale Σ_i ε_i P_ij M_ij |Q_ic|

|S_ij| is that of its terms, Σ_c |Q_ic K_jc| and the mask, since scores that forward and backward round differently
change P by as much, relatively. What numbers below the smallest normal one lose comes on top, which matters in float16.
Pure arithmetic on tensors; waits for the device.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator

import torch

from resilience.abft.arithmetic import operand_roundoff
from resilience.kernels.precision import float32_precision

__all__ = ["AttentionInputs", "backward_is_explained", "forward_is_explained", "scores_may_overflow"]

_AT_ONCE = 1 << 20
"""Scores in memory, at least those of one row."""

_UNCERTAIN = 0.1
"""A relative error of P beyond which nothing is said."""

_Gradients = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


@dataclasses.dataclass(frozen=True, slots=True)
class AttentionInputs:
    """What attention without dropout is computed from."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scale: float
    mask: torch.Tensor | None
    """Additive, or bool (true: seen), broadcastable to the scores (b, hq, tq, tk)."""
    causal: bool
    """Row i sees keys 0 to i, however many there are."""
    tolerance_scale: float = 1.0
    """On every bound."""

    def explains(
        self,
        stored: torch.Tensor,
        expected: tuple[torch.Tensor, torch.Tensor],
        is_open: torch.Tensor,
        may_overflow: torch.Tensor | None = None,
    ) -> bool:
        """Whether all of `stored` lies within the tolerance of what is expected, or has left the range of its dtype
        rightly.

        Args:
            stored: (rows, d).
            expected: elements and tolerances.
            is_open: bool, broadcastable to it: what cannot be told.
            may_overflow: the same, of what is not finite.
        """
        reference, tolerance = expected
        # Results may be added up in the stored dtype, block by block.
        tolerance = (tolerance + 8.0 * _grain(stored.dtype)) * self.tolerance_scale
        overflowed = ~(reference.abs() + tolerance < torch.finfo(stored.dtype).max) & ~stored.isfinite()
        if may_overflow is not None:
            overflowed = overflowed | (may_overflow & ~stored.isfinite())
        return bool((((stored.double() - reference).abs() <= tolerance) | overflowed | is_open).all())


@torch.no_grad()
def forward_is_explained(inputs: AttentionInputs, out: torch.Tensor) -> bool:
    """Whether round-off explains every element of O = `out`."""
    return all(
        not block.is_uncertain and inputs.explains(out[block.of_queries], block.out(head), block.is_beyond)
        for head in _heads(inputs)
        for block in head.blocks(inputs)
    )


@torch.no_grad()
def scores_may_overflow(inputs: AttentionInputs) -> bool:
    """Whether finite operands take any score out of the range of the arithmetic."""
    return any(bool(block.is_beyond.any()) for head in _heads(inputs) for block in head.blocks(inputs))


@torch.no_grad()
def backward_is_explained(
    inputs: AttentionInputs, out: torch.Tensor, d_out: torch.Tensor, gradients: _Gradients
) -> bool:
    """Whether round-off explains every element of O and of dQ, dK and dV; a gradient that was not asked for is None."""
    d_query, d_key, d_value = gradients
    for head in _heads(inputs):
        of_key, of_value = _Sum.like(head.key), _Sum.like(head.value)
        for block in head.blocks(inputs):
            stored = out[block.of_queries].double()
            if block.is_uncertain or not inputs.explains(out[block.of_queries], block.out(head), block.is_beyond):
                return False
            d_rows = d_out[block.of_queries].double()
            of_value.add(block.d_value(d_rows), block.is_beyond)
            d_products, error, may_overflow = block.d_products(head, inputs, stored, d_rows)
            expected = d_products @ head.key, error @ head.key.abs()
            if d_query is not None and not inputs.explains(
                d_query[block.of_queries], expected, block.is_beyond, may_overflow
            ):
                return False
            of_key.add((d_products.mT @ block.query, error.mT @ block.query.abs()), block.is_beyond, may_overflow)
        for gradient, total in ((d_key, of_key), (d_value, of_value)):
            if gradient is not None and not total.explains(inputs, gradient[head.index]):
                return False
    return True


@dataclasses.dataclass(slots=True)
class _Sum:
    """Of the parts of a gradient that the queries have."""

    terms: torch.Tensor
    tolerance: torch.Tensor
    is_open: torch.Tensor
    """Whether a row of the queries was; as `may_overflow`, a scalar."""
    may_overflow: torch.Tensor

    @classmethod
    def like(cls, operand: torch.Tensor) -> _Sum:
        no = torch.zeros((), dtype=torch.bool, device=operand.device)
        return cls(torch.zeros_like(operand), torch.zeros_like(operand), no, no)

    def add(
        self,
        part: tuple[torch.Tensor, torch.Tensor],
        is_open: torch.Tensor,
        may_overflow: torch.Tensor | None = None,
    ) -> None:
        self.terms += part[0]
        self.tolerance += part[1]
        self.is_open = self.is_open | is_open.any()
        if may_overflow is not None:
            self.may_overflow = self.may_overflow | may_overflow.any()

    def explains(self, inputs: AttentionInputs, gradient: torch.Tensor) -> bool:
        return inputs.explains(gradient, (self.terms, self.tolerance), self.is_open, self.may_overflow)


@dataclasses.dataclass(frozen=True, slots=True)
class _Head:
    """One head of keys, in float64, (tk, d)."""

    index: tuple[int, int]
    """(batch, head)"""
    key: torch.Tensor
    value: torch.Tensor

    def blocks(self, inputs: AttentionInputs) -> Iterator[_Block]:
        """Of the rows of all heads of queries that share it."""
        batch, head = self.index
        shared = inputs.query.shape[1] // inputs.key.shape[1]
        for query_head in range(head * shared, (head + 1) * shared):
            rows = max(1, _AT_ONCE // inputs.key.shape[2])
            for first in range(0, inputs.query.shape[2], rows):
                yield _Block.of(inputs, self, (batch, query_head, slice(first, first + rows)))


def _heads(inputs: AttentionInputs) -> Iterator[_Head]:
    batches, heads = inputs.key.shape[:2]
    for index in itertools.product(range(batches), range(heads)):
        yield _Head(index, inputs.key[index].double(), inputs.value[index].double())


@dataclasses.dataclass(frozen=True, slots=True)
class _Block:
    """Some rows of one head of queries, in float64."""

    of_queries: tuple[int, int, slice]
    query: torch.Tensor
    """(rows, d)"""
    probabilities: torch.Tensor
    """P, (rows, tk)"""
    error: torch.Tensor
    """How far each of P may be off, (rows, tk)"""
    grain: float
    """What a number may lose that is below the smallest normal one."""
    is_beyond: torch.Tensor
    """Of which rows the scores may leave the range of the arithmetic, (rows, 1)"""
    is_uncertain: bool
    """Whether round-off leaves some of the others open."""

    @classmethod
    def of(cls, inputs: AttentionInputs, head: _Head, of_queries: tuple[int, int, slice]) -> _Block:
        query = inputs.query[of_queries].double()
        products, terms = query @ head.key.mT, query.abs() @ head.key.abs().mT
        scores, size = inputs.scale * products, abs(inputs.scale) * terms
        # Also of keys that are hidden: a kernel may mask what it has computed. It may scale before or after.
        is_beyond = ~(terms.amax(1, keepdim=True) * max(1.0, abs(inputs.scale)) < _largest(inputs.query.dtype))
        if inputs.mask is not None:
            everywhere = (*inputs.query.shape[:3], inputs.key.shape[2])
            mask = inputs.mask.expand(everywhere)[of_queries]
            if mask.dtype == torch.bool:
                mask = torch.zeros_like(scores).masked_fill(~mask, -torch.inf)
            scores, size = scores + mask, size + mask.double().abs()
        if inputs.causal:
            row = torch.arange(of_queries[2].start, of_queries[2].start + len(query), device=query.device)
            hidden = torch.arange(scores.shape[1], device=query.device) > row.unsqueeze(1)
            scores = scores.masked_fill(hidden, -torch.inf)
        # A row that sees no key has probabilities of 0.
        probabilities = scores.softmax(1).nan_to_num(nan=0.0)
        size = torch.where(probabilities > 0.0, size, 0.0).amax(1, keepdim=True)
        error, grain = _relative_error(inputs, size), _grain(inputs.query.dtype)
        is_uncertain = not bool(((error <= _UNCERTAIN) | is_beyond).all())
        return cls(of_queries, query, probabilities, error * probabilities + grain, grain, is_beyond, is_uncertain)

    def out(self, head: _Head) -> tuple[torch.Tensor, torch.Tensor]:
        """O and how far it may be off, (rows, d)."""
        return self.probabilities @ head.value, self.error @ head.value.abs()

    def d_value(self, d_rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What these rows add to dV, and how far it may be off, (tk, d)."""
        return self.probabilities.mT @ d_rows, self.error.mT @ d_rows.abs()

    def d_products(
        self, head: _Head, inputs: AttentionInputs, stored: torch.Tensor, d_rows: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """scale·dS, the gradient of Q·Kᵀ, and how far it may be off, (rows, tk); and of which rows dP may leave the
        range of the arithmetic, or dS that of the stored dtype, (rows, 1).
        """
        scale, weighted = inputs.scale, d_rows * stored
        magnitude = d_rows.abs() @ head.value.abs().mT + weighted.abs().sum(1, keepdim=True)
        d_scores = self.probabilities * (d_rows @ head.value.mT - weighted.sum(1, keepdim=True))
        # The terms of dP − D may be rounded one by one, dS before it is scaled, or after.
        lost = self.grain * (stored.shape[1] * self.probabilities + 1.0)
        error = self.error * magnitude + lost
        limits, scales = torch.finfo(inputs.query.dtype), max(1.0, abs(scale))
        largest = ((d_scores.abs() + error) * scales).amax(1, keepdim=True)
        of_terms = (magnitude * scales).amax(1, keepdim=True)
        may_overflow = ~(largest < limits.max) | ~(of_terms < _largest(inputs.query.dtype))
        return scale * d_scores, abs(scale) * error + self.grain, may_overflow


def _relative_error(inputs: AttentionInputs, size: torch.Tensor) -> torch.Tensor:
    dtype = inputs.query.dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    stored, accumulated = torch.finfo(dtype).eps / 2, torch.finfo(wide).eps / 2
    # Operands may be rounded on their way in (TF32), in each of the products.
    operand = operand_roundoff(float32_precision(inputs.query.device.type)) if dtype == torch.float32 else 0.0
    length = inputs.key.shape[2] + inputs.key.shape[3]
    return (
        (16.0 * accumulated + 2.0 * operand) * size
        + accumulated * (8.0 * math.sqrt(length) + 32.0)
        + 8.0 * stored
        + 4.0 * operand
    )


def _largest(dtype: torch.dtype) -> float:
    """Of the arithmetic inside."""
    return torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).max


def _grain(dtype: torch.dtype) -> float:
    limits = torch.finfo(dtype)
    return max(limits.smallest_normal * limits.eps, torch.finfo(torch.float32).tiny)
