"""ATTNChecker's three sections of an attention (arXiv 2410.11720): sums carried through each, verified at its end.

S_AS = {X·Wq, X·Wk, Q·Kᵀ}, S_CL = {X·Wv, AP·V}, S_O = {CL·Wo}. Sums of X and of the weights are carried to those of Q, K
and V, and on to the scores AS, the context CL and the output O, which are verified by rows and by columns and mended by
EEC-ABFT. A fault in any GEMM of a section is thus mended at the section's end, *in the matrix at its end*: Q, K and V
stay wrong, which backward would read (dK = dSᵀ·Q). Therefore training checks each GEMM where it is made
(`handlers`), and this is the complete method as published, for inference, for comparison and as the tests' oracle.

Here is the eager attention that carries. Mask, softmax and dropout lie between the sections, so they may be any. What
changes rows of Q one by one (rotary embeddings, normalised queries) would end S_AS early, and is not offered.

Shapes: b batch, t queries, s keys, h heads, g key heads, d head width, i width of the input, o of the output, c sums.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from resilience.abft.carried import Carried, Encoded, encode, product
from resilience.abft.eec import rebuild
from resilience.abft.patterns import Pattern, Section, culprit

__all__ = ["AttentionWeights", "SectionReport", "Strike", "attend"]

_DTYPES = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})

Strike = Callable[[str, torch.Tensor], None]
"""`strike(site, tensor)` may corrupt the result of a GEMM in place, as broken hardware would. Sites: attention.q, .k,
.scores, .v, .context, .out, and `merged`, the context on its way into the last GEMM."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AttentionWeights:
    """The projections of one attention, as `nn.Linear` holds them: weights (out, in), biases (out,)."""

    q: torch.Tensor
    """(h·d, i)"""
    k: torch.Tensor
    """(g·d, i)"""
    v: torch.Tensor
    """(g·d, i)"""
    out: torch.Tensor
    """(o, h·d)"""
    q_bias: torch.Tensor | None = None
    k_bias: torch.Tensor | None = None
    v_bias: torch.Tensor | None = None
    out_bias: torch.Tensor | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SectionReport:
    """What was found and done at the end of a section."""

    section: Section
    pattern: Pattern
    culprit: str | None
    """The site that the pattern accuses; None without a fault, or with one that has spread."""
    clean: bool
    """Whether all sums agree, after corrections if there were any."""
    num_rebuilt: int
    """Elements rebuilt from the sums; never bit-exact."""
    max_ratio: float
    """Largest residual ÷ tolerance before any correction."""


def attend(
    x: torch.Tensor,
    weights: AttentionWeights,
    *,
    num_heads: int,
    num_kv_heads: int | None = None,
    source: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    generator: torch.Generator | None = None,
    sums: torch.dtype = torch.float64,
    tolerance_scale: float = 1.0,
    strike: Strike | None = None,
) -> tuple[torch.Tensor, list[SectionReport]]:
    """Eager multi-head attention, forward, in ATTNChecker's sections.

    Without a fault the output equals that of the same operations without sums, bit for bit.

    Args:
        x: (b, t, i) in float32, float64, bfloat16 or float16; the weights in the same dtype.
        weights: the four projections.
        num_heads: h.
        num_kv_heads: g, a divisor of h (grouped-query attention; 1 is multi-query); None is h.
        source: (b, s, i) that keys and values are made of; None is x.
        mask: additive, broadcastable to (b, h, t, s), any values including −INF.
        is_causal: hide the keys after each query, aligned to the first key as in SDPA.
        scale: of the scores; None is 1/√d.
        dropout_p: probability that a softmax output is dropped.
        generator: of the dropout.
        sums: float64, or float32 for devices where that is much faster.
        tolerance_scale: factor on every tolerance.
        strike: corrupts results; None in earnest.

    Returns:
        (b, t, o) and one report per section, in order.

    Raises:
        ValueError: heads that do not divide, or a dtype that is not checked.
    """
    num_kv_heads = num_kv_heads or num_heads
    _refuse(x, weights, num_heads, num_kv_heads)
    run = _Run(sums, tolerance_scale, strike or (lambda site, tensor: None))
    source = x if source is None else source
    repeats = num_heads // num_kv_heads
    with torch.no_grad():
        q = run.projected("attention.q", x, weights.q, weights.q_bias, num_heads, rows=False)
        k = run.projected("attention.k", source, weights.k, weights.k_bias, num_kv_heads, rows=False)
        raw = run.end(Section.SCORES, "attention.scores", q, run.shared(k, repeats).mT).value
        scores = raw * (1.0 / math.sqrt(q.value.shape[-1]) if scale is None else scale)
        probabilities = _probabilities(scores, mask, is_causal).to(x.dtype)
        if dropout_p > 0.0:
            keep = torch.rand(probabilities.shape, generator=generator, device=x.device) >= dropout_p
            probabilities = probabilities * keep / (1.0 - dropout_p)
        v = run.projected("attention.v", source, weights.v, weights.v_bias, num_kv_heads, rows=True)
        encoded = run.encode(probabilities, rows=False)
        context = run.end(Section.CONTEXT, "attention.context", encoded, run.shared(v, repeats))
        out = run.output(run.merged(context), weights.out, weights.out_bias)
    return out, run.reports


def _refuse(x: torch.Tensor, weights: AttentionWeights, num_heads: int, num_kv_heads: int) -> None:
    if x.dtype not in _DTYPES:
        raise ValueError(f"x has dtype {x.dtype}; one of {sorted(map(str, _DTYPES))} is needed")
    if weights.q.shape[0] % num_heads or num_heads % num_kv_heads or weights.k.shape[0] % num_kv_heads:
        raise ValueError(f"num_heads = {num_heads}, num_kv_heads = {num_kv_heads} do not divide the projections")


def _probabilities(scores: torch.Tensor, mask: torch.Tensor | None, is_causal: bool) -> torch.Tensor:
    if is_causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf)
    if mask is not None:
        scores = scores + mask
    return scores.softmax(-1)


class _Run:
    """One forward pass: how sums are taken, and the reports."""

    def __init__(self, sums: torch.dtype, tolerance_scale: float, strike: Strike) -> None:
        self._sums = sums
        self._scale = tolerance_scale
        self._strike = strike
        self.reports: list[SectionReport] = []

    def encode(self, value: torch.Tensor, *, rows: bool = True, columns: bool = True) -> Encoded:
        if value.numel() == 0:
            return Encoded(value)
        return encode(value, sums=self._sums, rows=rows, columns=columns)

    def projected(
        self, site: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, heads: int, *, rows: bool
    ) -> Encoded:
        """(b, heads, t, d) with the sums of its rows, or of its columns, carried from x and the weight."""
        value = F.linear(x, weight, bias)
        self._strike(site, value)
        value = value.view(*value.shape[:-1], heads, weight.shape[0] // heads).transpose(1, 2)
        if value.numel() == 0:
            return Encoded(value)
        by_head = weight.reshape(heads, -1, weight.shape[1]).mT.unsqueeze(0)  # (1, heads, i, d)
        addend = None
        if bias is not None:
            of_rows, of_columns = Carried.of_bias(bias.reshape(heads, -1), x.shape[1], self._sums)
            addend = Encoded(bias, of_rows, of_columns)
        left, right = Encoded(x.unsqueeze(1)), Encoded(by_head)
        if rows:
            right = self.encode(by_head, columns=False)
        else:
            left = self.encode(x.unsqueeze(1), rows=False)
        return product(left, right, value, addend=addend)

    @staticmethod
    def shared(one: Encoded, repeats: int) -> Encoded:
        """Each key head `repeats` times, for the query heads that share it."""
        if repeats == 1:
            return one
        rows, columns = (
            None if side is None else side.mapped(lambda tensor: tensor.repeat_interleave(repeats, 1))
            for side in (one.rows, one.columns)
        )
        return Encoded(one.value.repeat_interleave(repeats, 1), rows, columns)

    def end(self, section: Section, site: str, left: Encoded, right: Encoded) -> Encoded:
        """The last GEMM of a section, verified and mended."""
        value = left.value @ right.value
        self._strike(site, value)
        return self._verified(section, product(left, right, value) if value.numel() else Encoded(value))

    def merged(self, context: Encoded) -> Encoded:
        """(b, h, t, d) as (b, t, h·d), the columns with it: the sums of S_CL go on into S_O."""
        value = context.value.transpose(1, 2).flatten(2)
        self._strike("merged", value)
        columns = context.columns
        if columns is not None:
            columns = columns.mapped(lambda tensor: tensor.flatten(1, 2))
        return Encoded(value, None, columns)

    def output(self, context: Encoded, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """S_O."""
        value = F.linear(context.value, weight, bias)
        self._strike("attention.out", value)
        if value.numel() == 0:
            return self._verified(Section.OUTPUT, Encoded(value)).value
        addend = None
        if bias is not None:
            addend = Encoded(bias, *Carried.of_bias(bias, value.shape[1], self._sums))
        encoded = product(context, self.encode(weight.mT, columns=False), value, addend=addend)
        return self._verified(Section.OUTPUT, encoded).value

    def _verified(self, section: Section, encoded: Encoded) -> Encoded:
        repair = rebuild(encoded, tolerance_scale=self._scale)
        self.reports.append(
            SectionReport(
                section=section,
                pattern=repair.pattern,
                culprit=culprit(section, repair.pattern),
                clean=repair.clean,
                num_rebuilt=repair.num_rebuilt,
                max_ratio=repair.max_ratio,
            )
        )
        if not (repair.clean and repair.num_rebuilt):
            return encoded
        # A wrong V is in what the sums say of its column: from here on they are those of the mended matrix.
        return self.encode(encoded.value, rows=encoded.rows is not None, columns=encoded.columns is not None)
