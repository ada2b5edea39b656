"""Attention in float64 behind the identities: it explains what is clean and nothing else; no false alarm stays."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from resilience.abft import attention_reference, fused
from resilience.abft.attention_reference import AttentionInputs, backward_is_explained, forward_is_explained
from resilience.abft.invariants import AttentionBackward
from tests.attentions import MASKS, attention, corrupted

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def is_explained(call: AttentionBackward, *, causal: bool = False, tolerance_scale: float = 1.0) -> bool:
    inputs = AttentionInputs(call.query, call.key, call.value, call.scale, call.mask, causal, tolerance_scale)
    gradients = (call.d_query, call.d_key, call.d_value)
    explained = backward_is_explained(inputs, call.out, call.d_out, gradients)
    assert forward_is_explained(inputs, call.out) or not explained
    return explained


@pytest.mark.parametrize("dtype", _DTYPES, ids=str)
@pytest.mark.parametrize("mask", [*MASKS, "-1e4"])
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
    monkeypatch.setattr(attention_reference, "_AT_ONCE", 7 * 48)
    inputs = AttentionInputs(call.query, call.key, call.value, call.scale, seen.expand(2, 4, 48, 48), causal=False)
    assert backward_is_explained(inputs, call.out, call.d_out, (call.d_query, call.d_key, call.d_value))
    inputs = AttentionInputs(call.query, call.key, call.value, call.scale, ~seen, causal=False)
    assert not forward_is_explained(inputs, call.out)


@pytest.mark.parametrize("mask", ["lowest", "-1e9"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_that_only_large_finite_numbers_mask_leave_everything_open(dtype: torch.dtype, mask: str) -> None:
    """Their round-off is as large as they are, and so is what they add to dK and dV: it would hide any fault there."""
    call = attention(mask, dtype)
    assert not is_explained(call)
    assert not is_explained(corrupted(call, "d_key", rms=1000.0, place=577))


def test_a_gradient_that_was_not_asked_for_is_left_out() -> None:
    call = attention("causal", torch.float32)
    wrong = corrupted(call, "d_key", rms=1.0, place=577)
    assert is_explained(dataclasses.replace(wrong, d_key=None, d_query=None), causal=True)
    assert not is_explained(dataclasses.replace(wrong, d_query=None, d_value=None), causal=True)


def test_the_scale_of_the_thresholds_is_on_every_bound() -> None:
    call = attention("causal", torch.float32)
    assert not is_explained(call, causal=True, tolerance_scale=1e-3)
    wrong = corrupted(call, "d_query", rms=0.01, place=577)
    assert not is_explained(wrong, causal=True)
    assert is_explained(wrong, causal=True, tolerance_scale=1e3)


SETTINGS = {
    "causal": {"is_causal": True},
    "padding": {"attn_mask": torch.zeros(40, 40).masked_fill(torch.arange(40) > 33, float("-inf"))},
    "bool mask of each head": {"attn_mask": torch.arange(40).expand(2, 4, 40, 40) < 34},
    "scale": {"scale": -0.3},
    "shared keys": {"is_causal": True, "enable_gqa": True},
}


def run_sdpa(settings: dict[str, Any]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    heads = 2 if "enable_gqa" in settings else 4
    q, k, v = (torch.randn(2, n, 40, 16, generator=generator).requires_grad_() for n in (4, heads, heads))
    out = F.scaled_dot_product_attention(q, k, v, **settings)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), torch.ones_like(out) + out.detach())]


@pytest.fixture
def exceeded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Identities that round-off exceeds, in every call."""
    forward_ratio, backward_ratios = fused.forward_ratio, fused.backward_ratios
    monkeypatch.setattr(fused, "forward_ratio", lambda call: forward_ratio(call) + 1.5)
    monkeypatch.setattr(fused, "backward_ratios", lambda call: backward_ratios(call) + 1.5)


@pytest.mark.usefixtures("exceeded")
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("attempt", [0, 1])
def test_an_identity_that_round_off_exceeds_is_dismissed(protect: Any, settings: dict[str, Any], attempt: int) -> None:
    """The same in each replay, it would pass for a device that is broken."""
    expected = run_sdpa(settings)
    protection = protect(strength="invariants")
    told: list[tuple[str, bool, bool]] = []
    protection.tell_ratios(lambda site, ratio, is_alarm: told.append((site, ratio > 1.0, is_alarm)))
    protection.begin_micro_step(1, 0, attempt)
    with protection.active():
        results = run_sdpa(settings)
    assert protection.drain() == []
    assert told == [("attention.context", True, False), ("attention.dv", True, False)]
    assert all(torch.equal(one, other) for one, other in zip(results, expected, strict=True))


@pytest.mark.parametrize("is_exceeded", [False, True])
@pytest.mark.parametrize("site", ["attention.context", "attention.dq", "attention.dk", "attention.dv"])
def test_a_fault_that_comes_again_is_not_dismissed(
    protect: Any, striker: Any, site: str, is_exceeded: bool, request: pytest.FixtureRequest
) -> None:
    if is_exceeded:
        request.getfixturevalue("exceeded")
    protection = protect(strength="invariants")
    striker.arm(site, 0, lambda tensor: tensor[1, 2, 30, 4:5].add_(0.5), repeat=100)
    with protection.active():
        run_sdpa(SETTINGS["causal"])
    findings = protection.drain()
    assert findings
    assert not any(finding.mended or finding.inputs_bad for finding in findings)


@pytest.mark.usefixtures("exceeded")
def test_with_dropout_nothing_is_dismissed(protect: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which probabilities were left out is not known. The CPU's operator has no dropout: it is told that it had."""
    bind = fused.bind
    monkeypatch.setattr(fused, "bind", lambda *call: bind(*call) | {"dropout_p": 0.1})
    protection = protect(strength="invariants")
    with protection.active():
        run_sdpa(SETTINGS["causal"])
    assert len(protection.drain()) == 2


@pytest.mark.usefixtures("exceeded")
def test_what_is_not_finite_is_not_dismissed(protect: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A log-sum-exp that is NaN shows in no result of the forward."""
    forward_ratio = fused.forward_ratio
    monkeypatch.setattr(fused, "forward_ratio", lambda call: forward_ratio(call) * torch.nan)
    protection = protect(strength="invariants")
    with protection.active():
        run_sdpa(SETTINGS["causal"])
    (finding,) = protection.drain()
    assert finding.site == "attention.context"


@given(
    st.sampled_from(_DTYPES),
    st.tuples(st.integers(1, 3), st.sampled_from([(4, 4), (4, 2), (4, 1), (1, 1)])),
    st.tuples(st.integers(1, 40), st.integers(1, 64), st.integers(1, 33)),
    st.sampled_from(["none", "causal", "rows", "batches", "heads", "bool"]),
    st.sampled_from([1e-3, 1.0, 4.0]),
    st.sampled_from([None, 0.3, 2.0]),
    st.integers(0, 1000),
)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.usefixtures("exceeded")
def test_any_clean_call_is_explained(
    protect: Any,
    dtype: torch.dtype,
    batch_and_heads: tuple[int, tuple[int, int]],
    shape: tuple[int, int, int],
    mask: str,
    spread: float,
    scale: float | None,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    (batch, (heads, key_heads)), (length, keys, width) = batch_and_heads, shape

    def draw(*size: int) -> torch.Tensor:
        return (torch.randn(*size, generator=generator) * spread).to(dtype)

    masks = {
        "rows": draw(length, keys),
        "batches": torch.zeros(batch, 1, 1, keys, dtype=dtype).masked_fill(torch.arange(keys) > keys // 2, -torch.inf),
        "heads": draw(1, heads, length, keys),
        "bool": torch.rand(batch, 1, length, keys, generator=generator) > 0.4,
    }
    q, k, v = (draw(batch, h, n, width) for h, n in ((heads, length), (key_heads, keys), (key_heads, keys)))
    leaves = [one.requires_grad_() for one in (q, k, v)]
    protection = protect(strength="invariants")
    with protection.active():
        out = F.scaled_dot_product_attention(
            *leaves, masks.get(mask), is_causal=mask == "causal", scale=scale, enable_gqa=heads != key_heads
        )
        out.backward(draw(*out.shape))
    assert protection.drain() == []
    assert protection.num_failed_checks() == 0
    protection.uninstall()


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_gradient_that_leaves_the_range_rightly_is_dismissed(dtype: torch.dtype, protect: Any) -> None:
    """All queries look at one key, whose dV is the sum of all dO: a loss scaler meets that."""
    query, key, value = (normal(1, 1, 512, 16, seed=seed).to(dtype) for seed in range(3))
    query[..., 0], key[..., 0] = 20.0, 0.0
    key[..., 0, 0] = 4.0
    leaves = [operand.requires_grad_() for operand in (query, key, value)]
    scale = {torch.float16: 300.0, torch.bfloat16: 1e37, torch.float32: 1e37}[dtype]
    protection = protect()
    with protection.active():
        out = F.scaled_dot_product_attention(*leaves)
        out.backward(torch.full_like(out, scale))
    assert leaves[2].grad is not None
    assert not leaves[2].grad.isfinite().all()
    assert protection.drain() == []


def overflowing(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Finite query, key and value, whose scores leave the range of float32 in the last head."""
    query, key, value = (normal(1, 2, 8, 8, seed=seed).to(dtype) for seed in range(3))
    query[0, 1] *= 5e19
    key[0, 1] *= 5e19
    return [operand.requires_grad_() for operand in (query, key, value)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scores_that_leave_the_range_are_no_fault(dtype: torch.dtype, protect: Any) -> None:
    leaves = overflowing(dtype)
    protection = protect()
    with protection.active():
        out = F.scaled_dot_product_attention(*leaves)
        out.backward(torch.ones_like(out))
    assert leaves[0].grad is not None
    assert not leaves[0].grad.isfinite().all()
    assert protection.drain() == []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.5])
@pytest.mark.parametrize("site", ["attention.dq", "attention.dk", "attention.dv"])
def test_beside_scores_that_leave_the_range_other_heads_are_held(
    site: str, value: float, protect: Any, striker: Any
) -> None:
    leaves = overflowing()
    protection = protect(strength="invariants")
    striker.arm(site, 0, lambda tensor: tensor[0, 0, 3, 4:5].add_(value), repeat=100)
    with protection.active():
        out = F.scaled_dot_product_attention(*leaves)
        out.backward(torch.ones_like(out) * out.detach().sign())
    (finding,) = protection.drain()
    assert not finding.mended
    assert not finding.inputs_bad


def test_a_log_sum_exp_of_scores_that_leave_the_range_is_no_fault(
    protect: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The CPU's kernel hides it; others do not."""
    forward_ratio = fused.forward_ratio
    monkeypatch.setattr(fused, "forward_ratio", lambda call: forward_ratio(call) * torch.nan)
    protection = protect(strength="invariants")
    with protection.active():
        F.scaled_dot_product_attention(*overflowing())
    assert protection.drain() == []


def test_products_that_leave_the_range_on_the_way_explain_what_is_not_finite() -> None:
    """dS leaves float16's range before small keys bring it back: dQ would fit, but the kernel's is infinite."""
    factors = {"key": 1e-3, "value": 300.0}
    call = attention("none", torch.float16, factors=factors | {"d_out": 1e4})
    assert call.d_query is not None
    assert not call.d_query.isfinite().any()
    assert is_explained(call)
    assert not is_explained(dataclasses.replace(call, d_query=torch.full_like(call.d_query, 3e4)))
    assert not is_explained(dataclasses.replace(call, d_value=torch.full_like(call.value, torch.inf)))
    within = attention("none", torch.float16, factors=factors)
    assert is_explained(within)
    assert not is_explained(dataclasses.replace(within, d_query=call.d_query))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_beside_a_gradient_that_rightly_is_not_is_a_fault(
    value: float, protect: Any, striker: Any
) -> None:
    query, key, operand = (normal(1, 1, 512, 16, seed=seed).half() for seed in range(3))
    query[..., 0], key[..., 0] = 20.0, 0.0
    key[..., 0, 0] = 4.0
    leaves = [one.requires_grad_() for one in (query, key, operand)]
    protection = protect(strength="invariants")
    # dV of the first key is the sum of all dO, which float16 cannot hold; that of the others is near 0.
    striker.arm("attention.dv", 0, lambda tensor: tensor[0, 0, 7, 3:4].fill_(value), repeat=100)
    with protection.active():
        out = F.scaled_dot_product_attention(*leaves)
        out.backward(torch.full_like(out, 300.0))
    (finding,) = protection.drain()
    assert not finding.mended
