"""The identities of fused attention: true in float64 under every mask, silent on clean runs, loud on faults."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from resilience.abft.fused import FUSED_OPERATORS, bind
from resilience.abft.invariants import (
    BACKWARD_SITES,
    AttentionBackward,
    AttentionForward,
    _exact_ratios,
    _screened_ratios,
    backward_ratios,
    forward_ratio,
)
from resilience.events import Check, DetectionKind
from tests.attentions import FINITE, MASKS, attention, corrupted


def forward_of(call: AttentionBackward) -> AttentionForward:
    return AttentionForward(call.value, call.out, None, call.mask is not None, call.dropout)


@pytest.mark.parametrize("mask", MASKS)
def test_the_identities_hold_in_float64_to_round_off(mask: str) -> None:
    call = attention(mask, torch.float64)
    assert call.d_key is not None
    assert call.d_value is not None
    assert call.d_query is not None
    heads = call.key.shape[1]

    def shared(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(1, (heads, -1)).sum(2)

    seen = call.d_out * call.out.any(3, keepdim=True)
    weighted = (call.d_out * call.out).sum(2)
    torch.testing.assert_close(call.d_value.sum(2), shared(seen.sum(2)), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(call.d_key.sum(2), torch.zeros(2, heads, 32, dtype=torch.float64), rtol=0, atol=1e-11)
    of_query, of_key = (call.d_query * call.query).sum(2), (call.d_key * call.key).sum(2)
    torch.testing.assert_close(shared(of_query), of_key, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close((call.d_value * call.value).sum(2), shared(weighted), rtol=1e-10, atol=1e-10)
    assert float(forward_ratio(forward_of(call))) <= 1.0


def test_which_identities_survive_dropout() -> None:
    """Explicit attention with a dropout mask in float64: dk, dq and out hold, dv does not."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, 1, 20, 8, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(3)
    )
    keep = (torch.rand(20, 20, generator=generator) > 0.3).double() / 0.7
    out = ((query @ key.mT / math.sqrt(8)).softmax(-1) * keep) @ value
    d_out = torch.randn(1, 1, 20, 8, dtype=torch.float64, generator=generator)
    gradients = torch.autograd.grad(out, (query, key, value), d_out)
    operands = [x.detach() for x in (query, key, value, out)]
    for dropout, dv_holds in ((True, True), (False, False)):
        call = AttentionBackward(*operands, d_out, *gradients, scale=8**-0.5, mask=None, dropout=dropout)
        dv, *others = backward_ratios(call).tolist()
        assert (dv <= 1.0) is dv_holds
        assert max(others) <= 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("mask", [*MASKS, *FINITE])
def test_clean_attention_stays_well_below_its_tolerances(mask: str, dtype: torch.dtype) -> None:
    worst = 0.0
    for seed, (spread, length) in enumerate([(0.05, 48), (1.0, 48), (1.0, 300), (3.0, 48), (1.0, 3), (1.0, 12)]):
        if mask == "-1e9" and dtype == torch.float16:
            pytest.skip("out of the dtype's range")
        call = attention(mask, dtype, seed=seed, spread=spread, length=max(length, 12) if mask != "causal" else length)
        worst = max(worst, float(_exact_ratios(call).max()), float(forward_ratio(forward_of(call))))
        assert float(backward_ratios(call).max()) <= 1.0
    assert worst <= 0.7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("which", [("d_out",), ("value",), ("query", "key")], ids="-".join)
def test_small_and_large_operands_raise_no_alarm(which: tuple[str, ...], dtype: torch.dtype) -> None:
    """Down to where a dtype loses its precision, and, in the others, to where squares of float32 are none."""
    scales = (1e-3, 1e-5, 1e-6, 1e-7) if dtype == torch.float16 else (1e-7, 1e-15, 1e-20, 1e-25)
    for scale in scales if dtype == torch.float16 or which != ("d_out",) else (*scales, 1e15):
        factors = dict.fromkeys(which, scale)
        for mask in ("none", "causal"):
            assert float(backward_ratios(attention(mask, dtype, length=128, factors=factors)).max()) <= 1.0, scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("exactly", [True, False], ids=["exact", "screen first"])
def test_what_is_nearly_infinite_is_seen_beside_a_query_of_zero(dtype: torch.dtype, exactly: bool) -> None:
    call = attention("none", dtype, without_query=(1, 2, 9, 5))
    ratios = _exact_ratios if exactly else backward_ratios
    assert float(ratios(call).max()) <= 1.0
    assert call.d_query is not None
    call.d_query[1, 2, 9, 5] = 0.9 * torch.finfo(dtype).max
    assert not float(ratios(call)[2]) <= 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("size", [1e-10, 1.0, 1e10])
def test_what_is_too_large_depends_on_the_operands(dtype: torch.dtype, size: float) -> None:
    """Squares of large gradients are no numbers in float32; a fault beside small ones need not be near infinity."""
    call = attention("none", dtype, without_query=(1, 2, 9, 5), factors={"d_out": size, "value": size})
    assert float(_exact_ratios(call).max()) <= 1.0
    assert call.d_query is not None
    call.d_query[1, 2, 9, 5] = 1e10 * size * size
    assert not float(_exact_ratios(call)[2]) <= 1.0


@pytest.mark.parametrize("layout", ["heads_in_rows", "contiguous", "odd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_screen_is_the_exact_form_with_estimated_scales(dtype: torch.dtype, layout: str) -> None:
    """Any layout in memory; heads of few components, whose scales are estimated worst."""
    for seed in range(12):
        call = attention("grouped", dtype, seed=seed, length=64)
        if layout != "contiguous":
            call = dataclasses.replace(
                call,
                **{
                    name: getattr(call, name).transpose(1, 2 if layout == "heads_in_rows" else 3).contiguous()
                    .transpose(1, 2 if layout == "heads_in_rows" else 3)
                    for name in ("query", "key", "value", "out", "d_out", "d_query", "d_key", "d_value")
                },
            )  # fmt: skip
        assert float(_screened_ratios(call).max()) <= 1.0, "what the screen suspects costs ten times as much"
        for index, name in enumerate(("d_value", "d_key", "d_query", "out")):
            faulty = corrupted(call, name, rms=1e3, place=577 * seed)
            screened, exact = float(_screened_ratios(faulty)[index]), float(_exact_ratios(faulty)[index])
            # A fault widens the scale of its own component in the exact form, of all 32 here.
            assert 0.6 * exact <= screened <= 10.0 * exact, (name, screened, exact)


def test_few_clean_calls_reach_the_exact_form() -> None:
    suspected = [
        float(_screened_ratios(attention(mask, dtype, seed=seed, length=96)).max()) > 1.0
        for mask in ("none", "causal", "bias", "grouped")
        for dtype in (torch.float32, torch.bfloat16)
        for seed in range(20)
    ]
    assert sum(suspected) <= 1


def test_large_scores_raise_no_alarm_and_need_no_exact_form(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in models that were trained for a while: scores of 100 and more, a few keys that take all the mass."""
    monkeypatch.setattr("resilience.abft.invariants._exact_ratios", lambda call: pytest.fail("computed exactly"))
    for seed in range(20):
        call = attention("causal", torch.float32, seed=seed, spread=4.0, length=64)
        assert float(backward_ratios(call).max()) <= 1.0


@pytest.mark.parametrize(
    ("dtype", "name", "rms", "at_least"),
    [
        (torch.float32, "d_key", 0.1, 1.0),
        (torch.float32, "d_value", 0.1, 1.0),
        (torch.float32, "d_query", 0.1, 0.99),
        (torch.float32, "out", 0.1, 0.99),
        (torch.bfloat16, "d_key", 10.0, 1.0),
        (torch.bfloat16, "d_value", 10.0, 1.0),
        (torch.bfloat16, "d_query", 20.0, 0.85),
        (torch.bfloat16, "out", 20.0, 0.85),
    ],
    ids=str,
)
def test_share_of_faults_found_in_backward(dtype: torch.dtype, name: str, rms: float, at_least: float) -> None:
    """The figures of docs/detection.md. A fault of the forward's `out` shows here too."""
    call = attention("causal", dtype)
    found = [
        not float(backward_ratios(corrupted(call, name, rms=rms, place=577 * trial)).max()) <= 1.0
        for trial in range(120)
    ]
    assert sum(found) >= at_least * len(found), sum(found)


@pytest.mark.parametrize(("dtype", "change"), [(torch.float32, 0.03), (torch.bfloat16, 20.0)], ids=str)
def test_a_fault_in_the_forwards_scores_shows_in_backward(dtype: torch.dtype, change: float) -> None:
    """Output and log-sum-exp follow the wrong score together; the backward computes P again, and its rows miss 1."""
    found = 0
    for seed in range(20):
        clean = attention("none", dtype, seed=seed)
        scores = clean.query.double() @ clean.key.double().mT * clean.scale
        row = seed % scores.shape[2]
        scores[1, 2, row, int(scores[1, 2, row].argmax())] += change
        out = (scores.softmax(-1) @ clean.value.double()).to(dtype)
        logsumexp = scores.logsumexp(-1).float()
        gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            clean.d_out, clean.query, clean.key, clean.value, out, logsumexp, 0.0, False
        )
        call = dataclasses.replace(clean, out=out, d_query=gradients[0], d_key=gradients[1], d_value=gradients[2])
        found += not float(backward_ratios(call).max()) <= 1.0
    assert found >= 19, found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["d_query", "d_key", "d_value", "out"])
def test_rows_that_swap_places_show_component_by_component(name: str, dtype: torch.dtype) -> None:
    """They keep the sums of a gradient, and stay within the range of V: only the products with an operand tell."""
    for seed in range(10):
        call = attention("none", dtype, seed=seed)
        swapped = getattr(call, name).clone()
        swapped[1, 2, [3, 40]] = swapped[1, 2, [40, 3]]
        faulty = dataclasses.replace(call, **{name: swapped})
        assert float(backward_ratios(faulty).max()) > 1.0
        assert float(forward_ratio(forward_of(faulty))) <= 1.0


def test_what_they_cannot_see() -> None:
    """A wrong V gives right results of a wrong input; an element of dQ whose query is zero is in no product; in
    bfloat16 an element that is off by its own rms is round-off of its column.
    """
    call = attention("none", torch.float32)
    call.query[1, 2, 3, 4] = 0.0
    wrong = dataclasses.replace(call, d_query=call.d_query.clone())
    clean = backward_ratios(call)
    wrong.d_query[1, 2, 3, 4] += 1.0
    torch.testing.assert_close(backward_ratios(wrong)[2], clean[2])
    call = attention("none", torch.bfloat16, length=256)
    for name in ("d_query", "d_key", "d_value", "out"):
        unseen = [
            float(backward_ratios(corrupted(call, name, rms=1.0, place=577 * trial)).max()) <= 1.0
            for trial in range(20)
        ]
        assert sum(unseen) >= 15, name


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e30, -40.0])
def test_an_out_beyond_the_range_of_v_is_found_in_forward(value: float) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        call = attention("causal", dtype)
        call.out.view(-1)[777] = value
        assert not float(forward_ratio(forward_of(call))) <= 1.0


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 3e38])
@pytest.mark.parametrize("name", ["d_query", "d_key", "d_value"])
def test_extreme_gradients_are_found(name: str, value: float) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        call = attention("causal", dtype)
        getattr(call, name)[1, 2, 3, 4] = value
        assert not bool((backward_ratios(call) <= 1.0).all())


def test_gradients_that_were_not_asked_for_are_left_out() -> None:
    call = dataclasses.replace(attention("causal", torch.float32), d_query=None, d_key=None)
    dv, dk, dq, context = backward_ratios(call).tolist()
    assert (dk, dq) == (0.0, 0.0)
    assert 0.0 < dv <= 1.0
    assert 0.0 < context <= 1.0


@pytest.mark.parametrize("operator", FUSED_OPERATORS)
def test_every_form_names_what_the_checks_read(operator: str) -> None:
    schema = getattr(torch.ops.aten, operator).default._schema
    values = tuple(argument.name for argument in schema.arguments if not argument.kwarg_only)
    bound = bind(operator, values, {})
    assert (bound["query"], bound["key"], bound["value"]) == ("query", "key", "value")
    assert bound["dropout_p"] == "dropout_p"
    assert bound["scale"] is None
    backward = {argument.name for argument in getattr(torch.ops.aten, f"{operator}_backward").default._schema.arguments}
    assert {"query", "key", "value", "out", "dropout_p", "scale"} <= backward
    assert {"grad_out", "grad_out_"} & backward
    assert set(BACKWARD_SITES) >= {"attention.dq", "attention.dk", "attention.dv"}


def run_sdpa(**settings: Any) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, 4, 40, 16, generator=generator).requires_grad_() for _ in range(3))
    out = F.scaled_dot_product_attention(q, k, v, **settings)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), torch.ones_like(out) + out.detach())]


@pytest.mark.parametrize("strength", ["invariants", "checksum"])
@pytest.mark.parametrize("site", ["attention.context", "attention.dq", "attention.dk", "attention.dv"])
def test_faults_in_the_operators_are_mended_in_place(protect: Any, striker: Any, strength: str, site: str) -> None:
    expected = run_sdpa(is_causal=True)
    protection = protect(strength=strength)
    protection.begin_micro_step(1, 0, 0)

    def strike(tensor: torch.Tensor) -> None:
        tensor[1, 2, 3, 4] = 3e38

    striker.arm(site, 0, strike)
    with protection.active():
        results = run_sdpa(is_causal=True)
    (finding,) = protection.drain()
    assert finding.check is Check.INVARIANT
    assert finding.kind is DetectionKind.NEAR_INF
    assert finding.mended
    assert finding.layer == 0
    assert all(torch.equal(one, other) for one, other in zip(results, expected, strict=True))


def test_a_forward_fault_within_the_range_of_v_shows_in_backward(protect: Any, striker: Any) -> None:
    protection = protect(max_mends=1)

    def strike(tensor: torch.Tensor) -> None:
        tensor[0, 0, 20, 3] += 0.5

    striker.arm("attention.context", 0, strike)
    with protection.active():
        run_sdpa(is_causal=True)
    (finding,) = protection.drain()
    assert not finding.mended, "the forward is over: a replay must repair it"
    assert not finding.inputs_bad


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"is_causal": True},
        {"attn_mask": torch.ones(40, 40, dtype=torch.bool).tril()},
        {"attn_mask": torch.randn(40, 40)},
        {"scale": 0.3},
    ],
    ids=["plain", "causal", "mask", "bias", "scale"],
)
def test_clean_calls_change_nothing(protect: Any, settings: dict[str, Any]) -> None:
    expected = run_sdpa(**settings)
    protection = protect()
    with protection.active():
        results = run_sdpa(**settings)
    assert protection.drain() == []
    assert protection.checks() == {"attention.context": 1, "attention.dv": 1}
    for result, plain in zip(results, expected, strict=True):
        assert torch.equal(result, plain)
        assert result.stride() == plain.stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_shared_key_heads_change_nothing(protect: Any, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(2, 8, 40, 16, generator=generator).to(dtype).requires_grad_()
    k, v = (torch.randn(2, 2, 40, 16, generator=generator).to(dtype).requires_grad_() for _ in range(2))

    def run() -> list[torch.Tensor]:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return [out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))]

    expected = run()
    protection = protect(strength="invariants")
    with protection.active():
        results = run()
    assert protection.drain() == []
    assert sum(protection.checks().values()) == 2
    assert all(torch.equal(one, other) for one, other in zip(results, expected, strict=True))


def test_gradients_of_the_key_alone_are_checked(protect: Any, striker: Any) -> None:
    protection = protect(strength="invariants")
    q, v = (torch.randn(1, 2, 24, 16) for _ in range(2))
    k = torch.randn(1, 2, 24, 16, requires_grad=True)
    striker.arm("attention.dk", 0, lambda tensor: tensor[0, 1, 3, 4:5].fill_(float("nan")))
    with protection.active():
        out = F.scaled_dot_product_attention(q, k, v)
        (gradient,) = torch.autograd.grad(out.square().sum(), (k,))
    (finding,) = protection.drain()
    assert finding.mended
    assert bool(gradient.isfinite().all())


def test_bad_inputs_are_propagation(protect: Any) -> None:
    protection = protect()
    q = torch.randn(1, 2, 8, 16)
    q[0, 1, 3, 4] = float("nan")
    with protection.active():
        F.scaled_dot_product_attention(q, q, q)
    (finding,) = protection.drain()
    assert finding.inputs_bad
    assert not finding.mended


@pytest.mark.parametrize("mask", ["causal", "padding", "grouped"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_too_large_at_once_is_taken_one_sequence_after_the_other(
    mask: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = attention(mask, dtype)
    if call.mask is not None:
        call = dataclasses.replace(call, mask=call.mask.expand(2, 4, *call.mask.shape))
    at_once = _exact_ratios(call)
    monkeypatch.setattr("resilience.abft.invariants._AT_ONCE", 1)
    # In float32 the scores of a sequence widen its own tolerance only.
    assert bool((at_once <= _exact_ratios(call)).all())
    assert bool((_exact_ratios(call) <= 1.2 * at_once).all())
    for name in ("d_query", "d_key", "d_value", "out"):
        assert float(_exact_ratios(corrupted(call, name, rms=100.0, place=-1)).max()) > 1.0
    assert _exact_ratios(dataclasses.replace(call, d_query=None))[2] == 0.0
