"""Settings that a user may make, and defects of our own: neither comes out of a script's forward or backward."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from resilience.abft import carried, checksum, expectation, invariants, probabilities, sums
from resilience.abft.coverage import coverage
from resilience.abft.fused import fused_forward_handler
from resilience.abft.handlers import Context
from resilience.abft.labels import Label, Labels
from resilience.abft.record import Record
from resilience.clock import SystemClock
from resilience.config import DetectionConfig
from resilience.events import Check, DetectionKind
from resilience.kernels.precision import float32_precision

TOKENS = torch.arange(2 * 24).reshape(2, 24) % 50


def infinite(tensor: torch.Tensor) -> None:
    tensor[(0,) * tensor.dim()] = float("inf")


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def rounded(backend: Any, precision: str) -> Iterator[None]:
    before = backend.fp32_precision
    backend.fp32_precision = precision
    try:
        yield
    finally:
        backend.fp32_precision = before


SETTINGS: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "bfloat16 by default": lambda: default_dtype(torch.bfloat16),
    "float64 by default": lambda: default_dtype(torch.float64),
    "another device by default": lambda: torch.device("meta"),
    "mkldnn rounds to bfloat16": lambda: rounded(torch.backends.mkldnn.matmul, "bf16"),
    "CUDA rounds to TF32": lambda: rounded(torch.backends.cuda.matmul, "tf32"),
}


def forget_constants() -> None:
    for cached in (sums._vectors, carried.line_weights, invariants._signs, probabilities._ones):
        cached.cache_clear()
    probabilities._mass_and_signs.cache_clear()


@pytest.mark.parametrize("sdpa", [False, True], ids=["eager", "sdpa"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_global_settings_change_nothing_in_the_checks(
    setting: str, sdpa: bool, gpt: Callable[..., torch.nn.Module], protect: Any, striker: Any
) -> None:
    forget_constants()
    model = gpt(sdpa=sdpa, dropout=0.0)
    protection = protect(mend="rebuild")
    protection.attach(model)
    for step, site in enumerate(["", "attention.context", "linear.wgrad"]):
        protection.begin_micro_step(step, 0, 0)
        if site:
            striker.arm(site, 0, infinite)
        with protection.active(), contextlib.ExitStack() as stack:
            # A model's own constants may not stand the setting: its backward does.
            if not setting.startswith("another"):
                stack.enter_context(SETTINGS[setting]())
            loss = model(TOKENS)
            if setting.startswith("another"):
                stack.enter_context(SETTINGS[setting]())
            loss.backward()
        striker.armed = False
        found = protection.drain()
        assert protection.unprotected() == {}
        assert [(finding.site, finding.mended) for finding in found] == ([(site, True)] if site else [])


def test_the_precision_of_products_is_asked_of_the_device_s_own_back_end() -> None:
    assert float32_precision("cpu") == float32_precision("cuda") == "ieee"
    with rounded(torch.backends.cuda.matmul, "tf32"):
        assert (float32_precision("cpu"), float32_precision("cuda")) == ("ieee", "tf32")
    with rounded(torch.backends.mkldnn.matmul, "bf16"):
        assert (float32_precision("cpu"), float32_precision("cuda")) == ("bf16", "ieee")


def broken(*_: Any, **__: Any) -> Any:
    raise RuntimeError("a defect")


@pytest.mark.parametrize(
    ("module", "name", "site"),
    [
        (expectation, "sums_of", "linear.out"),
        (checksum, "worst_ratio_of", "attention.scores"),
        (probabilities, "sums_of", "attention.probs"),
    ],
    ids=str,
)
def test_a_check_that_fails_leaves_the_result_and_is_counted_and_said_once(
    module: Any,
    name: str,
    site: str,
    gpt: Callable[..., torch.nn.Module],
    protect: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = gpt(dropout=0.0)
    clean = model(TOKENS)
    protection = protect()
    protection.attach(model)
    protection.begin_micro_step(1, 0, 0)
    monkeypatch.setattr(module, name, broken)
    with caplog.at_level(logging.WARNING), protection.active():
        loss = model(TOKENS)
        loss.backward()
    assert torch.equal(loss, clean)
    assert protection.drain() == []
    reason = f"the check of {site} failed (RuntimeError)"
    assert protection.unprotected()[reason] > 0
    assert f"operations that run unchecked: {reason}" in protection.new_shortfalls()
    assert protection.new_shortfalls() == []
    assert [record.message.startswith(reason) for record in caplog.records].count(True) == 1


@pytest.mark.parametrize(
    ("sdpa", "where", "operator"),
    [
        (False, "resilience.abft.handlers.parse_gemm", "addmm"),
        (True, "resilience.abft.fused.bind", "_scaled_dot_product_flash_attention_for_cpu"),
        (False, "resilience.abft.labels.Labels.softmax", "_softmax"),
        (False, "resilience.abft.labels.Labels.softmax_backward", "_softmax_backward_data"),
    ],
)
def test_what_fails_before_an_operation_leaves_it_to_itself(
    sdpa: bool,
    where: str,
    operator: str,
    gpt: Callable[..., torch.nn.Module],
    protect: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A copy for which there is no memory; a schema of another version of torch."""
    model = gpt(sdpa=sdpa, dropout=0.0)
    clean = model(TOKENS)
    protection = protect()
    protection.attach(model)
    monkeypatch.setattr(where, broken)
    protection.begin_micro_step(1, 0, 0)
    with protection.active():
        loss = model(TOKENS)
        loss.backward()
    assert torch.equal(loss, clean)
    assert protection.unprotected()[f"the check of {operator} failed (RuntimeError)"] > 0
    assert protection.drain() == []


def test_what_triton_s_compiler_raises_ends_no_forward(
    gpt: Callable[..., torch.nn.Module], protect: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device without room for a kernel, an assembler that does not know it: no errors of Python's own classes."""
    errors = pytest.importorskip("triton.runtime.errors")

    def refused(*_: Any, **__: Any) -> Any:
        raise errors.OutOfResources(300000, 232448, "shared memory")

    monkeypatch.setattr(expectation, "sums_of", refused)
    protection = protect()
    protection.begin_micro_step(1, 0, 0)
    with protection.active():
        gpt(dropout=0.0)(TOKENS)
    assert protection.unprotected()["the check of linear.out failed (OutOfResources)"] > 0


def test_a_check_that_fails_is_not_counted_as_made(
    gpt: Callable[..., torch.nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = gpt(dropout=0.0)
    monkeypatch.setattr(expectation, "sums_of", broken)
    report = coverage(lambda: model(TOKENS).backward(), model)
    assert report.share == 0.0
    assert {operation.reason.partition(" failed")[0] for operation in report.unprotected} >= {
        "the check of linear.out", "the check of attention.scores", "the check of linear.wgrad",
    }  # fmt: skip


@pytest.mark.parametrize("sdpa", [False, True], ids=["eager", "sdpa"])
def test_a_suspicion_that_cannot_be_settled_is_a_fault(
    sdpa: bool,
    gpt: Callable[..., torch.nn.Module],
    protect: Any,
    striker: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = gpt(sdpa=sdpa, dropout=0.0)
    protection = protect()
    protection.attach(model)
    protection.begin_micro_step(1, 0, 0)
    striker.arm("attention.context", 1, infinite)
    monkeypatch.setattr(checksum, "confirm", broken)
    monkeypatch.setattr("resilience.abft.fused.repeat_until_clean", broken)
    with caplog.at_level(logging.CRITICAL), protection.active():
        model(TOKENS)
    (first, *_) = protection.drain()
    assert (first.site, first.layer, first.mended, first.kind) == (
        "attention.context", 1, False, DetectionKind.MISMATCH,
    )  # fmt: skip


def test_a_fault_that_stays_is_kept_however_many_were_mended(protect: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resilience.abft.record._MAX_FINDINGS", 5)
    protection = protect()
    record: Record = protection._record
    for layer in range(9):
        record.alarm(Label("linear.out", layer), Check.CHECKSUM, DetectionKind.INF, 2.0, 0.0, mended=True)
    for layer in range(9):
        record.alarm(Label("linear.dgrad", layer), Check.CHECKSUM, DetectionKind.INF, 2.0, 0.0)
    found = protection.drain()
    assert [finding.layer for finding in found if not finding.mended] == [0, 1, 2, 3, 4]
    assert len(found) == 10
    record.alarm(Label("linear.out", 0), Check.CHECKSUM, DetectionKind.INF, 2.0, 0.0)
    assert len(protection.drain()) == 1


def test_a_gradient_of_another_pass_at_the_same_address_is_none_of_ours(protect: Any) -> None:
    """Two losses over one graph, as gradient penalties have it: the second dC may stand where the first one stood."""
    protection = protect()
    worst: list[float] = []
    protection.tell_ratios(lambda site, ratio, alarm: worst.append(ratio))
    for step in range(30):
        protection.begin_micro_step(step, 0, 0)
        x, weight = torch.randn(64, 32, requires_grad=True), torch.nn.Parameter(torch.randn(48, 32))
        with protection.active():
            y = F.linear(x, weight)
            torch.autograd.grad((y * torch.randn(64, 48)).sum(), x, retain_graph=True)
            torch.autograd.grad((y * torch.randn(64, 48)).sum(), weight)
    assert len(worst) == 90
    assert max(worst) <= 1.0


@pytest.mark.parametrize(("dropout", "num_calls"), [(0.0, 2), (0.2, 1)])
def test_attention_that_draws_random_numbers_is_not_run_again_in_place(dropout: float, num_calls: int) -> None:
    """The mask would be another one, and so would all random numbers after it."""
    operator = "_scaled_dot_product_flash_attention_for_cpu"
    record = Record(share=1.0, clock=SystemClock())
    handle = fused_forward_handler(Context(DetectionConfig(), Labels(), record, None), operator)
    half = torch.randn(1, 2, 4, 16)
    query = torch.cat([half, -half], dim=2)  # 0 is within the range of every component
    num_run = 0

    def broken_once(*args: Any, **kwargs: Any) -> Any:
        nonlocal num_run
        num_run += 1
        out = torch.full_like(query, float("nan")) if num_run == 1 else torch.zeros_like(query)
        return out, torch.zeros(1, 2, 8)

    handle(broken_once, (query, query, query), {"dropout_p": dropout})
    (finding,) = record.drain()
    assert num_run == num_calls
    assert finding.mended is (dropout == 0.0)
