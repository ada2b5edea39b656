"""The whole of detection on one process: strike, find, mend, report; nothing else changes."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from resilience.abft.finding import Finding
from resilience.abft.labels import Label
from resilience.abft.protection import Protection
from resilience.abft.record import Record
from resilience.clock import SystemClock
from resilience.config import DetectionConfig
from resilience.events import Check, DetectionKind

TOKENS = torch.arange(2 * 24).reshape(2, 24) % 50

DEMO_SITES = [
    ("attention.q", 1),
    ("attention.scores", 0),
    ("attention.probs", 1),
    ("attention.context", 0),
    ("attention.out", 1),
    ("attention.dq", 0),
    ("attention.dk", 1),
    ("attention.dv", 0),
    ("attention.dp", 1),
    ("attention.ds", 0),
    ("linear.out", 2),
    ("linear.dgrad", 3),
    ("linear.wgrad", 0),
]


def infinite(tensor: torch.Tensor) -> None:
    tensor.view(-1)[tensor.numel() // 3] = float("inf")


def scaled(tensor: torch.Tensor) -> None:
    """A finite fault above a bfloat16's round-off: one element off by 20 times the largest."""
    tensor.view(-1)[tensor.numel() // 3] += 20.0 * float(tensor.abs().max()) + 1e-3


def train_step(model: torch.nn.Module) -> list[torch.Tensor]:
    """Loss and gradients of one step under a fixed seed."""
    torch.manual_seed(11)
    model.zero_grad()
    loss = model(TOKENS)
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)]


def protected_step(
    protection: Protection, model: torch.nn.Module, *, step: int = 1, attempt: int = 0
) -> list[torch.Tensor]:
    protection.begin_micro_step(step, 0, attempt)
    with protection.active():
        return train_step(model)


def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("corrupt", [infinite, scaled])
@pytest.mark.parametrize(("site", "layer"), DEMO_SITES)
def test_a_transient_fault_anywhere_is_mended_bit_for_bit(
    gpt: Any,
    protect: Any,
    striker: Any,
    dtype: torch.dtype,
    corrupt: Callable[[torch.Tensor], None],
    site: str,
    layer: int,
) -> None:
    model = gpt().to(dtype)
    expected = train_step(model)
    protection = protect()
    protection.attach(model)
    striker.arm(site, layer, corrupt)
    assert equal(protected_step(protection, model), expected)
    (finding,) = protection.drain()
    assert (finding.site, finding.layer) == (site, layer)
    assert finding.check is Check.CHECKSUM
    assert finding.kind is (DetectionKind.INF if corrupt is infinite else DetectionKind.MISMATCH)
    assert finding.mended
    assert finding.bit_exact
    assert not finding.inputs_bad
    assert finding.residual_ratio > 1.0
    assert finding.latency_ms > 0.0
    assert striker.num_left == 0
    assert protection.drain() == []


def test_a_persistent_fault_is_reported_unmended(gpt: Any, protect: Any, striker: Any) -> None:
    model = gpt()
    protection = protect(max_mends=2)
    protection.attach(model)
    striker.arm("attention.out", 0, infinite, repeat=100)
    protected_step(protection, model)
    first, *propagated = protection.drain()
    assert (first.site, first.mended, first.bit_exact, first.inputs_bad) == ("attention.out", False, False, False)
    assert striker.num_left == 97, "the first run and two mends"
    assert propagated
    assert all(finding.inputs_bad and not finding.mended for finding in propagated)


def test_the_second_mend_may_be_the_one_that_holds(gpt: Any, protect: Any, striker: Any) -> None:
    model = gpt()
    expected = train_step(model)
    protection = protect(max_mends=2)
    protection.attach(model)
    striker.arm("linear.out", 0, infinite, repeat=2)
    assert equal(protected_step(protection, model), expected)
    assert [finding.mended for finding in protection.drain()] == [True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"fused_projection": False},
        {"sdpa": True},
        {"checkpointing": "non_reentrant"},
        {"checkpointing": "reentrant"},
        {"sdpa": True, "checkpointing": "non_reentrant"},
    ],
    ids=str,
)
def test_without_a_fault_nothing_differs_and_nothing_is_found(
    gpt: Any, protect: Any, dtype: torch.dtype, settings: dict[str, Any]
) -> None:
    model = gpt(**settings).to(dtype)
    expected = train_step(model)
    protection = protect()
    protection.attach(model)
    for step in (1, 2):
        assert equal(protected_step(protection, model, step=step), expected)
    assert protection.drain() == []
    assert sum(protection.checks().values()) > 0
    sample = protection.residual_sample()
    assert 0 < len(sample) <= 64
    assert max(sample) <= 1.0
    assert protection.residual_sample() == []
    assert protection.check_seconds > 0.0


def test_a_compiled_model_gives_the_same_bits(gpt: Any, protect: Any) -> None:
    model = gpt(layers=1)
    compiled = torch.compile(model, backend="aot_eager")
    expected = train_step(compiled)
    protection = protect()
    protection.attach(model)
    assert equal(protected_step(protection, compiled), expected)
    assert protection.drain() == []
    assert sum(protection.checks().values()) >= 6 * 3


def test_memory_formats_and_random_states_are_left_alone(protect: Any) -> None:
    protection = protect()
    a, b = torch.randn(6, 5), torch.randn(7, 5)
    linear = torch.nn.functional.linear
    before = torch.random.get_rng_state(), random.getstate()
    expected = linear(a, b, torch.ones(7)), torch.bmm(a.expand(2, 6, 5), b.t().expand(2, 5, 7))
    with protection.active():
        results = linear(a, b, torch.ones(7)), torch.bmm(a.expand(2, 6, 5), b.t().expand(2, 5, 7))
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert before[1] == random.getstate()
    for result, plain in zip(results, expected, strict=True):
        assert torch.equal(result, plain)
        assert result.stride() == plain.stride()
        assert result.requires_grad == plain.requires_grad


def operand(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


FORMS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "mm.out": lambda c: torch.mm(operand(8, 9), operand(9, 7), out=c[0]),
    "addmm.out": lambda c: torch.addmm(operand(7), operand(8, 9), operand(9, 7), out=c[0], beta=2, alpha=0.5),
    "addmm.out over its addend": lambda c: torch.addmm(c[0], operand(8, 9), operand(9, 7), out=c[0]),
    "addmm_": lambda c: c[0].addmm_(operand(8, 9), operand(9, 7), beta=0.5),
    "addmm_ without addend": lambda c: c[0].addmm_(operand(8, 9), operand(9, 7), beta=0),
    "bmm.out": lambda c: torch.bmm(operand(3, 8, 9), operand(3, 9, 7), out=c),
    "baddbmm": lambda c: torch.baddbmm(c, operand(3, 8, 9), operand(3, 9, 7), beta=3),
    "baddbmm.out": lambda c: torch.baddbmm(operand(8, 7), operand(3, 8, 9), operand(3, 9, 7), out=c),
    "baddbmm_": lambda c: c.baddbmm_(operand(3, 8, 9), operand(3, 9, 7)),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_the_operators_is_mended(protect: Any, striker: Any, form: str) -> None:
    expected = operand(3, 8, 7)
    expected_result = FORMS[form](expected).clone()
    protection = protect()
    striker.arm("matmul", 0, infinite)
    protection.begin_micro_step(1, 0, 0)
    target = operand(3, 8, 7)
    with protection.active():
        result = FORMS[form](target)
    (finding,) = protection.drain()
    assert finding.mended
    assert torch.equal(result, expected_result)
    assert torch.equal(target, expected)


@pytest.mark.parametrize("strength", ["off", "screen"])
def test_weak_strengths_override_nothing(gpt: Any, protect: Any, striker: Any, strength: str) -> None:
    model = gpt()
    protection = protect(strength=strength)
    protection.attach(model)
    striker.arm("attention.scores", 0, infinite)
    protected_step(protection, model)
    assert protection.checks() == {}
    assert striker.seen == []


def test_invariants_strength_sees_fused_attention_only(gpt: Any, protect: Any) -> None:
    model = gpt(sdpa=True)
    protection = protect(strength="invariants")
    protection.attach(model)
    protected_step(protection, model)
    assert protection.checks() == {"attention.context": 2, "attention.dv": 2}


@pytest.mark.parametrize("share", [0.25, 0.5, 0.9])
def test_a_share_of_the_calls_of_each_site_is_checked(
    gpt: Any, protect: Any, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("secrets.randbits", lambda _: 4)
    model = gpt(layers=4)
    protection = protect(share=share)
    protection.attach(model)
    for _ in range(5):
        protected_step(protection, model)
    checks = protection.checks()
    assert checks["attention.scores"] == pytest.approx(20 * share, abs=4)
    # Gradients are checked where their products are.
    products = sum(
        checks.get(site, 0) for site in ("linear.out", *(f"attention.{name}" for name in ("q", "k", "v", "out")))
    )
    assert checks["linear.wgrad"] == checks["linear.dgrad"] == products == pytest.approx(5 * 17 * share, abs=8)
    assert checks["attention.dq"] == checks["attention.dk"] == checks["attention.scores"]


def test_what_is_computed_again_is_checked_where_it_was_the_first_time(gpt: Any, protect: Any) -> None:
    """Else sums that are carried from one of both do not fit the other, and its gradients are checked alone."""
    model = gpt(layers=4, sdpa=True, checkpointing="non_reentrant")
    protection = protect(share=0.5)
    protection.attach(model)
    for step in range(1, 6):
        protected_step(protection, model, step=step)
    checks = protection.checks()
    assert checks["attention.context"] == 2 * checks["attention.dv"] > 0


class Two(torch.autograd.Function):
    """Two products under one node, and their four gradients."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        between = x @ one
        ctx.save_for_backward(x, one, other, between)
        return between @ other

    @staticmethod
    def backward(ctx: Any, d_out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x, one, other, between = ctx.saved_tensors
        d_between = d_out @ other.t()
        return d_between @ one.t(), x.t() @ d_between, between.t() @ d_out


def test_gradients_of_several_products_under_one_node_keep_their_share(
    protect: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That the products agree on not being checked, as they mostly do, says nothing about their gradients."""
    monkeypatch.setattr("secrets.randbits", lambda _: 5)
    protection = protect(share=0.1)
    weights = [torch.nn.Parameter(torch.eye(4)) for _ in range(2)]
    for step in range(500):
        protection.begin_micro_step(step, 0, 0)
        with protection.active():
            Two.apply(torch.ones(2, 4, requires_grad=True), *weights).sum().backward()
    calls, checks = protection._record.calls, protection.checks()
    gradients = [site for site in calls if "grad" in site or site == "matmul"]
    share = sum(checks[site] for site in gradients) / sum(calls[site] for site in gradients)
    assert share == pytest.approx(0.1, abs=0.03)


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_fused_attention_is_checked_backward_where_it_was_forward(share: float, gpt: Any, protect: Any) -> None:
    """What forward's check cannot see of a fault, backward's does."""
    model = gpt(layers=1, sdpa=True)
    protection = protect(share=share)
    protection.attach(model)
    for step in range(1, 21):
        protected_step(protection, model, step=step)
        checks = protection.checks()
        assert checks.get("attention.context", 0) == checks.get("attention.dv", 0)
    assert 0 < checks["attention.context"] < 20


def test_outside_of_its_work_nothing_is_protected(gpt: Any, protect: Any, striker: Any) -> None:
    model = gpt()
    protection = protect()
    protection.attach(model)
    striker.arm("attention.scores", 0, infinite)
    train_step(model)
    assert protection.checks() == {}
    assert striker.seen == []


def test_uninstall_leaves_torch_and_the_model_as_they_were(gpt: Any) -> None:
    model = gpt()
    expected = train_step(model)
    protection = Protection(DetectionConfig())
    protection.install()
    protection.attach(model)
    protected_step(protection, model)
    num_checks = sum(protection.checks().values())
    protection.uninstall()
    assert equal(protected_step(protection, model), expected)
    assert sum(protection.checks().values()) == num_checks
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_replay_takes_weight_sums_anew(gpt: Any, protect: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = gpt()
    protection = protect()
    protection.attach(model)
    cleared: list[None] = []
    monkeypatch.setattr(protection._gemms, "clear", lambda: cleared.append(None))
    for step, attempt in ((1, 0), (1, 0), (2, 0), (2, 1), (2, 2), (3, 0)):
        protection.begin_micro_step(step, 0, attempt)
    assert len(cleared) == 5


def test_two_models_of_one_process_can_be_protected_in_turn(gpt: Any, protect: Any) -> None:
    protection = protect()
    for model in (gpt(), gpt(fused_projection=False)):
        protection.attach(model)
        protected_step(protection, model)
    assert protection.checks()["attention.k"] == 2
    assert protection.drain() == []


# --- results that wait on a device ------------------------------------------------------------------------------------


def test_deferred_results_become_findings_when_they_are_read() -> None:
    record = Record(share=1.0, clock=SystemClock())
    for layer, (ratio, inputs_bad) in enumerate([(0.5, 0.0), (3.0, 0.0), (float("nan"), 1.0)]):
        record.defer(Label("linear.out", layer), Check.CHECKSUM, torch.tensor([ratio, inputs_bad]))
    mismatch, bad = record.drain()
    assert (mismatch.layer, mismatch.kind, mismatch.inputs_bad) == (1, DetectionKind.MISMATCH, False)
    assert (bad.layer, bad.residual_ratio, bad.inputs_bad) == (2, float("inf"), True)
    assert not mismatch.mended
    assert record.sample() == [0.5]
    assert record.drain() == []


def test_findings_are_bounded() -> None:
    record = Record(share=1.0, clock=SystemClock())
    for _ in range(5000):
        record.alarm(Label("matmul", 0), Check.CHECKSUM, DetectionKind.NAN, 2.0, 0.0)
    findings = record.drain()
    assert len(findings) == 4096
    assert isinstance(findings[0], Finding)
    assert dataclasses.is_dataclass(findings[0])
