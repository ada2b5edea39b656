"""Attention in float64 behind the identities: it explains what is clean and nothing else; no false alarm stays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from resilience.abft import attention_reference, fused
from resilience.abft.attention_reference import AttentionInputs, backward_is_explained, forward_is_explained
from resilience.abft.invariants import AttentionBackward
from tests.attentions import MASKS, attention, corrupted

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def is_explained(call: AttentionBackward, *, causal: bool = False) -> bool:
    inputs = AttentionInputs(call.query, call.key, call.value, call.scale, call.mask, causal)
    gradients = (call.d_query, call.d_key, call.d_value)
    explained = backward_is_explained(inputs, call.out, call.d_out, gradients)
    assert forward_is_explained(inputs, call.out) or not explained
    return explained


@pytest.mark.parametrize("dtype", _DTYPES, ids=str)
@pytest.mark.parametrize("mask", [*MASKS, "lowest", "-1e4"])
def test_what_is_clean_is_explained(mask: str, dtype: torch.dtype) -> None:
    for seed, (spread, length) in enumerate([(0.05, 48), (1.0, 48), (1.0, 300), (3.0, 48), (8.0, 64), (1.0, 12)]):
        call = attention(mask, dtype, seed=seed, spread=spread, length=length)
        assert is_explained(call, causal=mask in ("causal", "grouped")), (spread, length)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("which", [("d_out",), ("value",), ("query", "key")], ids="-".join)
def test_small_and_large_operands_are_explained(which: tuple[str, ...], dtype: torch.dtype) -> None:
    large = 1e15 if which == ("d_out",) else 1.0
    for scale in (1e-3, 1e-6) if dtype == torch.float16 else (1e-7, 1e-15, 1e-20, large):
        call = attention("causal", dtype, length=128, factors=dict.fromkeys(which, scale))
        assert is_explained(call, causal=True), scale


@pytest.mark.parametrize(
    ("dtype", "rms"), [(torch.float32, 1e-2), (torch.bfloat16, 5.0), (torch.float16, 1.0)], ids=str
)
@pytest.mark.parametrize("mask", ["none", "causal", "padding", "grouped"])
@pytest.mark.parametrize("name", ["out", "d_query", "d_key", "d_value"])
def test_one_wrong_element_is_not(name: str, mask: str, dtype: torch.dtype, rms: float) -> None:
    """Of what round-off is far below."""
    call = attention(mask, dtype, length=64)
    for trial in range(20):
        assert not is_explained(corrupted(call, name, rms=rms, place=577 * trial), causal=mask in ("causal", "grouped"))


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 3e38, -3e38])
@pytest.mark.parametrize("name", ["out", "d_query", "d_key", "d_value"])
def test_extremes_are_not(name: str, value: float) -> None:
    call = attention("causal", torch.float32)
    getattr(call, name)[1, 2, 3, 4] = value
    assert not is_explained(call, causal=True)


def test_a_bool_mask_is_that_of_infinities(monkeypatch: pytest.MonkeyPatch) -> None:
    """In blocks of rows, too."""
    call = attention("rows_without_keys", torch.float32)
    assert call.mask is not None
    seen = call.mask == 0.0
    monkeypatch.setattr(attention_reference, "_ROWS", 7)
    inputs = AttentionInputs(call.query, call.key, call.value, call.scale, seen, causal=False)
    assert backward_is_explained(inputs, call.out, call.d_out, (call.d_query, call.d_key, call.d_value))
    inputs = AttentionInputs(call.query, call.key, call.value, call.scale, ~seen, causal=False)
    assert not forward_is_explained(inputs, call.out)


def run_sdpa(*, causal: bool) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, 4, 40, 16, generator=generator).requires_grad_() for _ in range(3))
    mask = None if causal else torch.zeros(40, 40).masked_fill(torch.arange(40) > 33, float("-inf"))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), torch.ones_like(out) + out.detach())]


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "padding"])
@pytest.mark.parametrize("attempt", [0, 1])
def test_an_identity_that_round_off_exceeds_is_dismissed(protect: Any, causal: bool, attempt: int) -> None:
    """The same in each replay, it would pass for a device that is broken."""
    expected = run_sdpa(causal=causal)
    protection = protect(strength="invariants", threshold_scale=1e-9)
    told: list[tuple[str, bool]] = []
    protection.tell_ratios(lambda site, ratio, is_alarm: told.append((site, is_alarm and ratio > 1.0)))
    protection.begin_micro_step(1, 0, attempt)
    with protection.active():
        results = run_sdpa(causal=causal)
    assert protection.drain() == []
    assert {is_alarm for _, is_alarm in told} == {False}
    assert all(torch.equal(one, other) for one, other in zip(results, expected, strict=True))


@pytest.mark.parametrize("threshold_scale", [1.0, 1e-9])
@pytest.mark.parametrize("site", ["attention.context", "attention.dq", "attention.dk", "attention.dv"])
def test_a_fault_that_comes_again_is_not_dismissed(
    protect: Any, striker: Any, site: str, threshold_scale: float
) -> None:
    protection = protect(strength="invariants", threshold_scale=threshold_scale)
    striker.arm(site, 0, lambda tensor: tensor[1, 2, 30, 4:5].add_(0.5), repeat=100)
    with protection.active():
        run_sdpa(causal=True)
    findings = protection.drain()
    assert findings
    assert not any(finding.mended or finding.inputs_bad for finding in findings)
    assert all(finding.site.startswith("attention.") for finding in findings)


def test_with_dropout_nothing_is_dismissed(protect: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which probabilities were left out is not known. The CPU's operator has no dropout: it is told that it had."""
    bind = fused.bind
    monkeypatch.setattr(fused, "bind", lambda *call: bind(*call) | {"dropout_p": 0.1})
    protection = protect(strength="invariants", threshold_scale=1e-9)
    with protection.active():
        run_sdpa(causal=True)
    assert protection.drain()
