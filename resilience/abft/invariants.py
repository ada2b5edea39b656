"""Identities that hold around any fused attention kernel, forward and backward, per batch and head, in O(T·D) work.

Shapes: query, out, d_query, d_out (b, hq, tq, d); key, value and their gradients (b, hk, tk, d), hq a multiple of hk;
logsumexp (b, hq, tq). With P the attention probabilities (after dropout where there is any), D_i = dO_i·O_i:

    range   min_j V_j ≤ O_i ≤ max_j V_j in every component                       forward, no dropout
    dv      Σ_j dV_j = Σ_i dO_i                                                  backward, no dropout
    dk      Σ_j dK_j = 0            since Σ_j dS_ij = 0                           backward
    dq      ⟨dQ, Q⟩ = ⟨dK, K⟩       both are ⟨dS, S⟩                               backward
    out     ⟨dV, V⟩ = Σ_i D_i       both are Σ_ij P_ij dO_i·V_j                   backward; sees a fault of the
    forward's O

Under a causal or additive mask all of them hold; rows that see no key have O_i = 0 and are left out of `dv`. With
fewer key heads than query heads, sums over queries run over the heads that share a key head. In float32 they see
nearly everything that is above round-off; in bfloat16 dK and dV well, O and dQ only gross errors.

Pure arithmetic on tensors: no state, no verdicts.
"""

from __future__ import annotations

import dataclasses

import torch

from resilience.abft.thresholds import invariant_factor

__all__ = ["BACKWARD_SITES", "AttentionBackward", "AttentionForward", "backward_ratios", "forward_ratio"]

BACKWARD_SITES = ("attention.dv", "attention.dk", "attention.dq", "attention.context")
"""Which operation is to blame when a ratio of `backward_ratios` is over 1, in its order; the first one that is counts.
"""

_TINY = 1e-37

_LARGEST_SCORE = 1e4
"""Scores above it do not widen tolerances further: a faulty operand would hide itself."""


@dataclasses.dataclass(frozen=True, slots=True)
class AttentionForward:
    """Inputs and results of a fused attention's forward."""

    value: torch.Tensor
    out: torch.Tensor
    logsumexp: torch.Tensor | None
    masked: bool
    """Whether an additive mask was given, so that rows may see no key."""
    dropout: bool


@dataclasses.dataclass(frozen=True, slots=True)
class AttentionBackward:
    """Inputs and results of a fused attention's backward; a gradient that was not asked for is None."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    out: torch.Tensor
    d_out: torch.Tensor
    d_query: torch.Tensor | None
    d_key: torch.Tensor | None
    d_value: torch.Tensor | None
    scale: float
    masked: bool
    dropout: bool


def forward_ratio(call: AttentionForward) -> torch.Tensor:
    """Excess over the range of V ÷ tolerance, a scalar; NaN or infinite where O or the log-sum-exp is not finite."""
    wide = _wide(call.out)
    out_low, out_high = (bound.to(wide) for bound in torch.aminmax(call.out, dim=2))
    if call.dropout:
        excess = torch.zeros((), dtype=wide, device=call.out.device) * (out_low.sum() + out_high.sum())
    else:
        groups = call.out.shape[1] // call.value.shape[1]
        low, high = (bound.to(wide).repeat_interleave(groups, dim=1) for bound in torch.aminmax(call.value, dim=2))
        if call.masked:
            low, high = low.clamp(max=0), high.clamp(min=0)
        tolerance = torch.maximum(low.abs(), high.abs()) * _range_factor(call.out, call.value.shape[2]) + _TINY
        excess = (torch.maximum(low - out_low, out_high - high) / tolerance).clamp(min=0).max()
    if call.logsumexp is not None and not call.masked:
        excess = excess + call.logsumexp.sum() * 0
    return excess


def backward_ratios(call: AttentionBackward) -> torch.Tensor:
    """Residual ÷ tolerance of the identities dv, dk, dq, out; (4,), each the worst over batches and heads.

    0 where an identity does not apply; NaN or infinite where something is not finite. The scale of a tolerance is the
    root of the sum of squares of the terms: a fault widens it by its own size times a factor far below 1, so it cannot
    hide.
    """
    wide = _wide(call.out)
    query, key, value, out, d_out = (x.to(wide) for x in (call.query, call.key, call.value, call.out, call.d_out))
    d_query, d_key, d_value = (None if x is None else x.to(wide) for x in (call.d_query, call.d_key, call.d_value))
    bound = _Bound.of(call, query, key)
    heads = key.shape[1]
    weighted = d_out * out
    dv = dk = dq = context = torch.zeros((), dtype=wide, device=out.device)
    if d_value is not None:
        if not call.dropout:
            seen = d_out * out.any(dim=3, keepdim=True) if call.masked else d_out
            dv = bound.ratio(_Sums.of(d_value, (2,)), _Sums.of(seen, (2,)).shared(heads))
        context = bound.ratio(_Sums.of(d_value * value, (2, 3)), _Sums.of(weighted, (2, 3)).shared(heads))
    if d_key is not None:
        # Each row of dS sums to the round-off of D_i, which Q_i then multiplies.
        noise = weighted.square().sum(3, keepdim=True) * (call.scale * query).square()
        squares = _share(noise.sum(2), heads)
        dk = bound.ratio(_Sums.of(d_key, (2,)), _Sums(torch.zeros_like(squares), squares))
        if d_query is not None:
            dq = bound.ratio(_Sums.of(d_key * key, (2, 3)), _Sums.of(d_query * query, (2, 3)).shared(heads))
    return torch.stack([dv, dk, dq, context])


@dataclasses.dataclass(frozen=True, slots=True)
class _Sums:
    """One side of an identity, per batch and head: the sum of its terms and the sum of their squares."""

    total: torch.Tensor
    squares: torch.Tensor

    @classmethod
    def of(cls, terms: torch.Tensor, dimensions: tuple[int, ...]) -> _Sums:
        return cls(terms.sum(dimensions), terms.square().sum(dimensions))

    def shared(self, key_heads: int) -> _Sums:
        return _Sums(_share(self.total, key_heads), _share(self.squares, key_heads))


@dataclasses.dataclass(frozen=True, slots=True)
class _Bound:
    """|Σ one − Σ other| ≤ random·√(Σ one² + Σ other²) + coherent·min(|Σ one|, |Σ other|)."""

    random: torch.Tensor | float
    coherent: torch.Tensor | float

    @classmethod
    def of(cls, call: AttentionBackward, query: torch.Tensor, key: torch.Tensor) -> _Bound:
        """`query` and `key` in the wide dtype. Errors of exp grow with the scores, which their norms bound."""
        stored, accumulated = torch.finfo(call.out.dtype).eps / 2, torch.finfo(query.dtype).eps / 2
        length, width = max(query.shape[2], key.shape[2]), query.shape[3]
        random = invariant_factor(stored=stored, accumulated=accumulated, length=length, width=width)
        coherent = invariant_factor(stored=0.0, accumulated=accumulated, length=length, width=width)
        if stored > accumulated:
            return cls(random, coherent)
        largest = (query.square().sum(3).amax() * key.square().sum(3).amax()).sqrt() * call.scale
        of_scores = 2.0 * accumulated * largest.clamp(max=_LARGEST_SCORE)
        return cls(random + of_scores, coherent + of_scores)

    def ratio(self, one: _Sums, other: _Sums) -> torch.Tensor:
        """Worst residual ÷ tolerance; NaN or infinite where a sum, or its scale, is not finite."""
        residual = (one.total - other.total).abs()
        squares = one.squares + other.squares
        tolerance = self.random * squares.sqrt() + self.coherent * torch.minimum(one.total.abs(), other.total.abs())
        return (residual / (tolerance + _TINY) + squares * 0.0).max()


def _share(of_query_heads: torch.Tensor, key_heads: int) -> torch.Tensor:
    """Sum over the query heads that share a key head: (b, hq, …) to (b, hk, …)."""
    if of_query_heads.shape[1] == key_heads:
        return of_query_heads
    batch, _, *rest = of_query_heads.shape
    return of_query_heads.reshape(batch, key_heads, -1, *rest).sum(2)


def _wide(tensor: torch.Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _range_factor(out: torch.Tensor, length: int) -> float:
    """O is a weighted mean whose weights sum to 1 within round-off."""
    stored, wide = torch.finfo(out.dtype).eps / 2, torch.finfo(_wide(out)).eps / 2
    return float(3.0 * stored + 4.0 * (length**0.5 + 16.0) * wide)
