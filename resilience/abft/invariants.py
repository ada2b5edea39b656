"""Identities that hold around any fused attention kernel, forward and backward, per batch and head, in O(T·D) work.

Shapes: query, out, d_query, d_out (b, hq, tq, d); key, value and their gradients (b, hk, tk, d), hq a multiple of hk;
logsumexp (b, hq, tq). With P the attention probabilities (after dropout where there is any), D_i = dO_i·O_i:

    range   min_j V_j ≤ O_i ≤ max_j V_j in every component                       forward, no dropout
    dv      Σ_j dV_j = Σ_i dO_i                                                  backward, no dropout
    dk      Σ_j dK_j = 0            since Σ_j dS_ij = 0                           backward
    dq      Σ_i dQ_ic Q_ic = Σ_j dK_jc K_jc     both are scale·Σ_ij dS_ij Q_ic K_jc        backward
    out     Σ_j dV_jc V_jc = Σ_i dO_ic O_ic     both are Σ_ij P_ij dO_ic V_jc              backward; sees a fault of
    the forward's O

The last two hold for every component c by itself, which is sharper than their sums ⟨dQ, Q⟩ and ⟨dV, V⟩ by the root of
the width: a fault stands against the round-off of one component. Under a causal or additive mask all of them hold; rows
that see no key have O_i = 0 and are left out of `dv`. With fewer key heads than query heads, sums over queries run over
the heads that share a key head. In float32 they see nearly everything that is above round-off; in bfloat16 what is
several times the rms of a gradient or of O.

Pure arithmetic on tensors: no state, no verdicts.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch

from resilience.abft.thresholds import invariant_factor
from resilience.kernels.identities import Side, excess_ratio, identity_ratio, side_ratio
from resilience.kernels.lengthwise import extremes, pair_sums

__all__ = ["BACKWARD_SITES", "AttentionBackward", "AttentionForward", "backward_ratios", "forward_ratio"]

BACKWARD_SITES = ("attention.dv", "attention.dk", "attention.dq", "attention.context")
"""Which operation is to blame when a ratio of `backward_ratios` is over 1, in its order; the first one that is counts.
"""

_LARGEST_SCORE = 1e4
"""Scores above it do not widen tolerances further: a faulty operand would hide itself."""


_AT_ONCE = 1 << 25
"""Elements of O that the exact form takes at once; of more, one sequence after the other: it makes some fifteen tensors
of that size in float32, which a device that a model fills does not have."""

_GROSS = 1024.0
"""Times what a gradient can be: the identities are for what is below."""

_UNBOUNDED = 1e6
"""A tolerance that no sum of probabilities exceeds."""


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
    mask: torch.Tensor | None
    """Additive, broadcastable to the scores (b, hq, tq, tk)."""
    dropout: bool


@torch.no_grad()
def forward_ratio(call: AttentionForward) -> torch.Tensor:
    """Excess over the range of V ÷ tolerance, a scalar; NaN or infinite where O or the log-sum-exp is not finite."""
    of_out = extremes(call.out)
    if call.dropout:
        excess = of_out.sum() * 0.0
    else:
        factor = _range_factor(call.out, call.value.shape[2])
        excess = excess_ratio(of_out, extremes(call.value), factor, with_zero=call.masked)
    if call.logsumexp is not None and not call.masked:
        excess = excess + call.logsumexp.sum() * 0
    return excess


@torch.no_grad()
def backward_ratios(call: AttentionBackward) -> torch.Tensor:
    """Residual ÷ tolerance of the identities dv, dk, dq, out; (4,), each the worst over batches and heads.

    0 where an identity does not apply; NaN or infinite where something is not finite. The scale of a tolerance is the
    root of the sum of squares of the terms: a fault widens it by its own size times a factor far below 1, so it cannot
    hide.

    On a CPU, float32 and bfloat16 are screened first (`_screened_ratios`, some twenty times cheaper); what raises no
    suspicion there is not computed exactly. On other devices nothing may wait for a value, and all is computed.
    """
    if call.out.device.type == "cpu" and call.out.dtype in (torch.float32, torch.bfloat16):
        screened = _screened_ratios(call)
        worst = float(screened.max())
        if worst > 1.0 and call.out.dtype == torch.float32:
            # Large scores explain more; to widen the tolerances by them shrinks no ratio by less than this.
            random = _random_factor(call)
            screened = screened * (random / (random + float(_of_scores(call))))
            worst = float(screened.max())
        if worst <= 1.0:
            return screened
    return _exact_ratios(call)


# --- screen -----------------------------------------------------------------------------------------------------------

_SCREEN_SHARE = 0.8
"""Of the exact tolerance: leaves room for the error of an estimated scale."""


@torch.no_grad()
def _screened_ratios(call: AttentionBackward) -> torch.Tensor:
    """As `_exact_ratios`, reading each tensor once. Sums of squares are estimated: the squared sum of terms under
    random signs is their sum of squares on average. Scores do not widen tolerances, and rows without keys count: the
    exact form has the last word.
    """
    stored, wide = torch.finfo(call.out.dtype).eps / 2, torch.finfo(torch.float32).eps / 2
    length, width = max(call.query.shape[2], call.key.shape[2]), call.query.shape[3]
    random = _SCREEN_SHARE * invariant_factor(stored=stored, accumulated=wide, length=length, width=width)
    coherent = _SCREEN_SHARE * invariant_factor(stored=0.0, accumulated=wide, length=length, width=width)
    signs, of_keys = _signs(call.query.shape[2]), _signs(call.key.shape[2])
    of_d_out, _, terms = pair_sums(call.d_out, call.out, signs)
    dv = dk = dq = context = 0.0
    if call.d_value is not None:
        of_d_value, _, of_both = pair_sums(call.d_value, call.value, of_keys)
        if not call.dropout:
            dv = identity_ratio(of_d_value, of_d_out, random, coherent)
        context = identity_ratio(of_both, terms, random, coherent)
    if call.d_key is not None:
        # Where dQ was not asked for, Q takes its place.
        d_query = call.query if call.d_query is None else call.d_query
        of_d_query, of_query, of_queries = pair_sums(d_query, call.query, signs)
        of_d_key, _, of_both = pair_sums(call.d_key, call.key, of_keys)
        # As in the exact form, with the noise of the rows and the size of their queries taken as independent.
        row_weight = call.scale**2 / call.query.shape[2]
        dk = identity_ratio(of_d_key, of_query, random, coherent, rows=terms, row_weight=row_weight)
        if call.d_query is not None:
            dq = identity_ratio(of_both, of_queries, random, coherent, beside=of_d_query)
    return torch.tensor([dv, dk, dq, context], dtype=torch.float32, device="cpu")


@functools.lru_cache(maxsize=64)
def _signs(length: int) -> torch.Tensor:
    """(length, 4): ones, and three columns of fixed pseudo-random signs."""
    generator = torch.Generator("cpu").manual_seed(length)
    signs = torch.randint(0, 2, (3, length), generator=generator, device="cpu").float() * 2.0 - 1.0
    return torch.cat([torch.ones_like(signs[:1]), signs]).T


# --- exact ------------------------------------------------------------------------------------------------------------


def _exact_ratios(call: AttentionBackward) -> torch.Tensor:
    if call.out.numel() <= _AT_ONCE or call.out.shape[0] == 1:
        return _ratios_at_once(call)
    return torch.stack([_ratios_at_once(_sequence(call, number)) for number in range(call.out.shape[0])]).amax(0)


def _sequence(call: AttentionBackward, number: int) -> AttentionBackward:
    """One of the batch."""

    def of(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor[number : number + 1]

    shared = call.mask is None or call.mask.dim() < 4 or call.mask.shape[0] == 1
    tensors = ("query", "key", "value", "out", "d_out", "d_query", "d_key", "d_value")
    parts: dict[str, Any] = {name: of(getattr(call, name)) for name in tensors}
    return dataclasses.replace(call, **parts, mask=call.mask if shared else of(call.mask))


def _ratios_at_once(call: AttentionBackward) -> torch.Tensor:
    # On a CPU few calls come here; and squares of very large or small elements are none in float32.
    wide = torch.float64 if call.out.is_cpu else _wide(call.out)
    query, key, value, out, d_out = (x.to(wide) for x in (call.query, call.key, call.value, call.out, call.d_out))
    d_query, d_key, d_value = (None if x is None else x.to(wide) for x in (call.d_query, call.d_key, call.d_value))
    bound = _Bound.of(call)
    masked = bound.wider(_of_mask(call))
    heads, length = key.shape[1], max(query.shape[2], key.shape[2])
    spacing = torch.finfo(torch.float16).smallest_normal * torch.finfo(torch.float16).eps
    grain = 8.0 * spacing if call.out.dtype == torch.float16 else 0.0
    weighted = d_out * out
    dv = dk = dq = context = torch.zeros((), dtype=wide, device=out.device)
    if d_value is not None:
        if not call.dropout:
            seen = d_out if call.mask is None else d_out * out.any(dim=3, keepdim=True)
            dv = masked.ratio(_side(d_value), _side(seen).shared(heads), grain * length**0.5)
        context = masked.ratio(
            _side(d_value * value, _floor(call, value)), _side(weighted, _floor(call, d_out)).shared(heads)
        )
    if d_key is not None:
        # Each row of dS sums to the round-off of D_i, and to D_i times that of Σ P, which Q_i then multiplies.
        of_rows = weighted.square().sum(3, keepdim=True) + weighted.sum(3, keepdim=True).square()
        noise = of_rows * (call.scale * query).square()
        squares = noise.sum(2)
        # dS is rounded to the stored dtype, too, before Q multiplies it.
        of_grain = grain * (length**0.5 + length * call.scale * query.square().mean().sqrt())
        dk = masked.ratio(_side(d_key), Side(torch.zeros_like(squares), squares).shared(heads), of_grain)
        if d_query is not None:
            of_query = _side(d_query * query, _floor(call, query))
            dq = bound.ratio(_side(d_key * key, _floor(call, key)), of_query.shared(heads))
            # Beside a query of exactly 0 the identity does not see dQ: what is too large to be a gradient is NaN here.
            dq = torch.where(d_query.abs().amax() > _largest_gradient(call, wide), torch.nan, dq)
    return torch.stack([dv, dk, dq, context])


def _largest_gradient(call: AttentionBackward, wide: torch.dtype) -> torch.Tensor:
    """What no element of dQ comes near, whatever the size of the operands; infinite or NaN where it has no number.

    |dQ_ic| ≤ scale·Σ_j P_ij·|dP_ij − D_i|·|K_jc|, and |dP_ij| and |D_i| are at most d·max|dO|·max|V|. Large finite
    masks make PyTorch's P too large by up to the length, dropout by 1 ÷ (1 − p).
    """
    d_out, value, key = (x.abs().amax().to(wide) for x in (call.d_out, call.value, call.key))
    factor = _GROSS * call.key.shape[2] * call.query.shape[3] * abs(call.scale)
    return factor * d_out * value * key + _GROSS * torch.finfo(call.out.dtype).smallest_normal


def _side(terms: torch.Tensor, floor: torch.Tensor | None = None) -> Side:
    """`floor`: what the terms would be of elements at the smallest normal number; below it, round-off stops shrinking
    with them, which matters in float16 only.
    """
    squares = terms.square().sum(2)
    return Side(terms.sum(2), squares if floor is None else squares + floor.square().sum(2))


@dataclasses.dataclass(frozen=True, slots=True)
class _Bound:
    """|Σ one − Σ other| ≤ random·√(Σ one² + Σ other²) + coherent·min(|Σ one|, |Σ other|)."""

    random: torch.Tensor | float
    coherent: torch.Tensor | float

    @classmethod
    def of(cls, call: AttentionBackward) -> _Bound:
        """Errors of exp grow with the scores, which the norms of queries and keys bound."""
        stored, accumulated = torch.finfo(call.out.dtype).eps / 2, torch.finfo(_wide(call.out)).eps / 2
        length, width = max(call.query.shape[2], call.key.shape[2]), call.query.shape[3]
        random = invariant_factor(stored=stored, accumulated=accumulated, length=length, width=width)
        coherent = invariant_factor(stored=0.0, accumulated=accumulated, length=length, width=width)
        if stored > accumulated:
            return cls(random, coherent)
        return cls(random, coherent).wider(_of_scores(call))

    def wider(self, by: torch.Tensor | float) -> _Bound:
        return _Bound(self.random + by, self.coherent + by)

    def ratio(self, one: Side, other: Side, absolute: torch.Tensor | float = 0.0) -> torch.Tensor:
        """Worst residual ÷ tolerance; NaN or infinite where a sum, or its scale, is not finite."""
        return side_ratio(one, other, self.random, self.coherent, absolute)


def _random_factor(call: AttentionBackward) -> float:
    """Of float32: what `_Bound.of` begins with."""
    half = torch.finfo(torch.float32).eps / 2
    length, width = max(call.query.shape[2], call.key.shape[2]), call.query.shape[3]
    return invariant_factor(stored=half, accumulated=half, length=length, width=width)


def _of_scores(call: AttentionBackward) -> torch.Tensor:
    """Scores that forward and backward round differently change P by as much, relatively. Measured in training at up to
    4.3 units of the largest product of norms, where that was 50 to 180; twice as much is let pass.
    """
    wide = _wide(call.out)
    query, key = (x.to(wide).square().sum(3).amax() for x in (call.query, call.key))
    largest = (query * key).sqrt() * call.scale
    return 8.0 * (torch.finfo(wide).eps / 2) * largest.clamp(max=_LARGEST_SCORE)


def _of_mask(call: AttentionBackward) -> torch.Tensor | float:
    """A row whose keys are all masked, but by finite numbers, has scores and a log-sum-exp far from 0: they are rounded
    by as much as that, and what PyTorch's backward makes of them, exp(S − LSE), need not sum to 1.
    """
    if call.mask is None or not call.mask.is_floating_point():
        return 0.0
    mask = call.mask
    for dimension in range(mask.dim()):
        if mask.stride(dimension) == 0:  # expanded: the same again and again
            mask = mask.narrow(dimension, 0, 1)
    highest = mask.amax(-1)
    depth = torch.where(highest.isfinite(), -highest, 0.0).clamp(min=0.0).amax().to(_wide(call.out))
    return (8.0 * (torch.finfo(_wide(call.out)).eps / 2) * depth).clamp(max=_UNBOUNDED)


def _floor(call: AttentionBackward, operand: torch.Tensor) -> torch.Tensor | None:
    if call.out.dtype != torch.float16:
        return None
    return operand * torch.finfo(torch.float16).smallest_normal


def _wide(tensor: torch.Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _range_factor(out: torch.Tensor, length: int) -> float:
    """O is a weighted mean whose weights sum to 1 within round-off."""
    stored, wide = torch.finfo(out.dtype).eps / 2, torch.finfo(_wide(out)).eps / 2
    return float(3.0 * stored + 4.0 * (length**0.5 + 16.0) * wide)
