"""Attention forward and backward with every check, in plain PyTorch at any precision: the kernels are held to it.

Shapes: q, o, d_o (b, h, tq, d), k, v (b, hk, tk, d). P = softmax(scale·q·kᵀ) under the mask, D_i = dO_i·O_i,
dS = P∘(dO·Vᵀ − D).
"""

from __future__ import annotations

import dataclasses
import math

import torch

__all__ = ["Attention", "attend", "residuals"]


@dataclasses.dataclass(frozen=True, slots=True)
class Attention:
    """Everything that a forward and a backward pass compute, per batch and query head; dk and dv per key head."""

    scores: torch.Tensor
    """q·kᵀ, before scale and mask."""
    visible: torch.Tensor
    probs: torch.Tensor
    lse: torch.Tensor
    out: torch.Tensor
    d_probs: torch.Tensor
    d_scores: torch.Tensor
    dq: torch.Tensor
    dk: torch.Tensor
    dv: torch.Tensor


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    d_out: torch.Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
) -> Attention:
    """Forward and backward in the dtype of the operands. A query that sees no key has O = 0 and no gradient."""
    key_heads, group = k.shape[1], q.shape[1] // k.shape[1]
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    wide_k, wide_v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    scores = q @ wide_k.mT
    visible = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
    if causal:
        visible = visible.tril()
    masked = (scale * scores).masked_fill(~visible, -math.inf)
    lse = masked.logsumexp(-1) if k.shape[2] else scores.new_full(scores.shape[:-1], -math.inf)
    probs = torch.where(visible, (masked - lse[..., None]).exp(), 0.0).nan_to_num(0.0)
    out = probs @ wide_v
    d_probs = d_out @ wide_v.mT
    d_scores = probs * (d_probs - (d_out * out).sum(-1, keepdim=True))
    shared = (q.shape[0], key_heads, group, k.shape[2], q.shape[3])
    dk = (scale * d_scores.mT @ q).view(shared).sum(2)
    dv = (probs.mT @ d_out).view(shared).sum(2)
    return Attention(scores, visible, probs, lse, out, d_probs, d_scores, scale * d_scores @ wide_k, dk, dv)


def residuals(
    run: Attention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, d_out: torch.Tensor, *, scale: float
) -> dict[str, torch.Tensor]:
    """Residual of each identity that the kernels check (README.md), by its name in `records.CheckBit`.

    Zero in exact arithmetic, under every mask. Rows are queries, or keys for dv, dk and what dkdv computes again.
    """
    group = q.shape[1] // k.shape[1]
    wide_k, wide_v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    seen = run.visible.any(-1).to(q.dtype) * (run.lse > -math.inf)

    d_rows = (d_out * run.out).sum(-1, keepdim=True)
    inverse = (run.lse[..., None] - scale * run.scores).exp()
    weight = d_out.norm(dim=-1).mean() * v.norm(dim=-1).amax()
    quotients = (run.d_scores + weight * run.probs) * inverse - (run.d_probs - d_rows + weight)
    quotient = torch.where(run.visible, quotients, 0.0)

    def shared(of_query_heads: torch.Tensor) -> torch.Tensor:
        batch, _, *rest = of_query_heads.shape
        return of_query_heads.reshape(batch, k.shape[1], group, *rest).sum(2)

    return {
        "scores": run.scores.sum(-1) - (q * wide_k.sum(2, keepdim=True)).sum(-1),
        "context": run.out.sum(-1) - (run.probs @ wide_v.sum(-1, keepdim=True)).squeeze(-1),
        "mass": run.probs.sum(-1) - seen,
        "ds": run.d_scores.sum(-1),
        "dq": run.dq.sum(-1) - scale * (run.d_scores @ wide_k.sum(-1, keepdim=True)).squeeze(-1),
        "dv": run.dv.sum(-1) - shared((run.probs.mT @ d_out.sum(-1, keepdim=True)).squeeze(-1)),
        "dk": run.dk.sum(-1) - scale * shared((run.d_scores.mT @ q.sum(-1, keepdim=True)).squeeze(-1)),
        "scores_again": shared(run.scores.sum(-2)) - (k * shared(q.sum(2))[:, :, None]).sum(-1),
        "dp_rows": run.d_probs.sum(-1) - (d_out * wide_v.sum(2, keepdim=True)).sum(-1),
        "ds_rows": (run.d_scores - run.probs * run.d_probs).sum(-1) + (run.probs * d_rows).sum(-1),
        "quotient": shared(quotient.sum(-2)),
        "dp": shared(run.d_probs.sum(-2)) - (v * shared(d_out.sum(2))[:, :, None]).sum(-1),
    }
