"""Attention by the CPU's fused operators, forward and backward, under every mask; clean, or with a wrong element."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from types import MappingProxyType

import torch

from resilience.abft.invariants import AttentionBackward

__all__ = ["FINITE", "MASKS", "attention", "corrupted"]

MASKS = ("none", "causal", "bias", "padding", "rows_without_keys", "grouped", "longer_keys")
FINITE = {"lowest": None, "-1e9": -1e9, "-1e4": -1e4}
"""Masks of finite numbers, by which some rows see no key: left padding under a causal mask."""


def attention(
    mask: str,
    dtype: torch.dtype,
    *,
    seed: int = 0,
    spread: float = 1.0,
    length: int = 48,
    factors: Mapping[str, float] = MappingProxyType({}),
    without_query: tuple[int, ...] = (),
) -> AttentionBackward:
    """One attention, forward and backward, through the operators themselves."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, of: str = "", shift: float = 0.0) -> torch.Tensor:
        drawn = torch.randn(*shape, generator=generator) * spread + shift
        return (drawn * factors.get(of, 1.0)).to(dtype)

    key_heads, keys = 2 if mask == "grouped" else 4, 2 * length if mask == "longer_keys" else length
    query, key = normal(2, 4, length, 32, of="query"), normal(2, key_heads, keys, 32, of="key")
    value = normal(2, key_heads, keys, 32, of="value", shift=0.5)
    if without_query:
        query[without_query] = 0.0
    bias = None
    if mask == "bias":
        bias = normal(length, keys)
    elif mask in ("padding", "rows_without_keys"):
        bias = torch.zeros(length, keys, dtype=dtype).masked_fill(torch.arange(keys) > keys - 9, float("-inf"))
        if mask == "rows_without_keys":
            bias[5:8] = float("-inf")
    elif mask in FINITE:
        hidden = torch.ones(length, keys, dtype=torch.bool).triu(1) | (torch.arange(keys) < 7)
        low = FINITE[mask]
        bias = torch.zeros(length, keys, dtype=dtype).masked_fill(
            hidden, torch.finfo(dtype).min if low is None else low
        )
    forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    causal = mask in ("causal", "grouped")
    out, logsumexp = forward(query, key, value, 0.0, causal, attn_mask=bias)
    d_out = normal(2, 4, length, 32, of="d_out", shift=0.1)
    if mask == "grouped":
        # The CPU's backward wants equal heads; the gradients of shared heads are summed, as `enable_gqa` does.
        wide = [x.repeat_interleave(2, 1) for x in (key, value)]
        d_query, *d_shared = backward(d_out, query, *wide, out, logsumexp, 0.0, causal, attn_mask=bias)
        d_key, d_value = (x.double().unflatten(1, (2, 2)).sum(2).to(dtype) for x in d_shared)
    else:
        d_query, d_key, d_value = backward(d_out, query, key, value, out, logsumexp, 0.0, causal, attn_mask=bias)
    return AttentionBackward(
        query, key, value, out, d_out, d_query, d_key, d_value,
        scale=1.0 / math.sqrt(32), mask=bias, dropout=False,
    )  # fmt: skip


def corrupted(call: AttentionBackward, name: str, *, rms: float, place: int) -> AttentionBackward:
    tensor = getattr(call, name).clone(memory_format=torch.contiguous_format)
    tensor.view(-1)[place % tensor.numel()] += rms * float(tensor.float().square().mean().sqrt())
    return dataclasses.replace(call, **{name: tensor})
