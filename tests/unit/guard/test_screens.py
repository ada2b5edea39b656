"""The screens of local gradients: what alarms, and above all what does not."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from resilience.abft.protection import Protection
from resilience.config import DetectionConfig
from resilience.events import Check, DetectionKind
from resilience.guard.screens import GradientScreen, NormHistory, Reading, _norm


def readings(*norms: float, micro_step: int = 0) -> list[Reading]:
    return [Reading(micro_step=micro_step, index=index, norm=norm) for index, norm in enumerate(norms)]


def test_the_history_is_silent_for_three_steps() -> None:
    history = NormHistory(64.0, 16)
    for _ in range(2):
        history.add(readings(1.0))
        assert history.limit(0) == math.inf
    history.add(readings(1.0))
    assert history.limit(0) == 64.0


def test_a_small_parameter_may_grow_beyond_the_whole_gradient() -> None:
    history = NormHistory(64.0, 16)
    for _ in range(3):
        history.add(readings(1e-6, 3.0, 4.0))
    assert history.limit(0) == pytest.approx(8 * 5.0), "the norm of the whole gradient, √64 times"
    assert history.limit(2) == 256.0


def test_a_step_that_is_not_finite_is_not_taken_as_normal() -> None:
    history = NormHistory(64.0, 16)
    for _ in range(3):
        history.add(readings(1.0))
    history.add(readings(math.inf))
    assert history.limit(0) == 64.0


@given(
    st.lists(st.lists(st.floats(1e-6, 1e6), min_size=3, max_size=3), min_size=3, max_size=30),
    st.floats(2.0, 100.0),
    st.integers(2, 16),
)
def test_no_alarm_within_the_factor_and_always_one_far_above(
    steps: list[list[float]], factor: float, num_steps: int
) -> None:
    history = NormHistory(factor, max(3, num_steps))
    for step in steps:
        history.add(readings(*step))
    recent = steps[-max(3, num_steps) :]
    for index in range(3):
        largest = max(step[index] for step in recent)
        whole = max(math.hypot(*step) for step in recent)
        limit = history.limit(index)
        assert limit >= factor * largest
        assert limit <= max(factor * largest, math.sqrt(factor) * whole) * (1 + 1e-9)


class Screened:
    def __init__(self, **settings: float) -> None:
        self.model = torch.nn.Linear(4, 3)
        self.screen = GradientScreen(self.model, DetectionConfig.model_validate({"strength": "screen", **settings}))

    def step(self, scale: float = 1.0, *, loss_scale: float = 1.0) -> list[Reading]:
        self.screen.begin()
        self.model.zero_grad()
        (self.model(torch.ones(2, 4)).sum() * scale).backward()
        return self.screen.read(loss_scale)


def test_norms_are_those_of_the_local_gradients() -> None:
    screened = Screened()
    found = {reading.index: reading.norm for reading in screened.step()}
    assert found[0] == pytest.approx(float(screened.model.weight.grad.norm()))  # type: ignore[union-attr]
    assert found[1] == pytest.approx(float(screened.model.bias.grad.norm()))  # type: ignore[union-attr]


def test_a_spike_is_an_alarm_with_the_parameters_name() -> None:
    screened = Screened()
    for _ in range(3):
        screened.screen.verified(screened.step())
    assert screened.screen.findings(screened.step(30.0)) == []
    found = screened.screen.findings(screened.step(1e4))
    assert {(finding.param, finding.check, finding.kind) for finding in found} == {
        ("weight", Check.NORM, DetectionKind.NORM_SPIKE),
        ("bias", Check.NORM, DetectionKind.NORM_SPIKE),
    }
    assert found[0].residual_ratio > 100


def test_a_change_of_the_loss_scale_is_no_spike() -> None:
    screened = Screened()
    for _ in range(3):
        screened.screen.verified(screened.step(2.0**20, loss_scale=2.0**20))
    assert screened.screen.findings(screened.step(2.0**8, loss_scale=2.0**8)) == []
    assert screened.screen.findings(screened.step(2.0**28, loss_scale=2.0**28)) == []


@pytest.mark.parametrize(
    ("scale", "kind"),
    [(math.nan, DetectionKind.NAN), (math.inf, DetectionKind.INF), (1e38, DetectionKind.NEAR_INF)],
)
def test_what_is_not_finite_is_an_alarm_at_once(scale: float, kind: DetectionKind) -> None:
    screened = Screened()
    found = screened.screen.findings(screened.step(scale))
    assert {finding.kind for finding in found} == {kind}
    assert {finding.check for finding in found} == {Check.SCREEN}


def test_reading_changes_no_gradient_and_hooks_come_off() -> None:
    screened = Screened()
    screened.step()
    with_hooks = screened.model.weight.grad.clone()  # type: ignore[union-attr]
    screened.screen.remove()
    assert screened.step() == []
    assert torch.equal(with_hooks, screened.model.weight.grad)  # type: ignore[arg-type]


def test_fingerprints_are_taken_only_when_asked_for() -> None:
    screened = Screened()
    screened.step()
    assert screened.screen.fingerprints() == ()
    screened.screen.fingerprinting = True
    screened.step()
    first = screened.screen.fingerprints()
    screened.step()
    assert first == screened.screen.fingerprints()
    assert len(first) == 2


def test_screens_call_nothing_that_counts_as_an_unchecked_operation() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.LayerNorm(16), torch.nn.Linear(16, 4))
    screen, protection = GradientScreen(module, DetectionConfig()), Protection(DetectionConfig())
    protection.install()
    try:
        with protection.active():
            module(torch.randn(5, 8)).square().sum().backward()
    finally:
        protection.uninstall()
        screen.remove()
    assert len(screen.read(1.0)) == 6
    assert protection.unprotected() == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.complex64], ids=str)
@pytest.mark.parametrize("shape", [(), (7,), (0, 3), (30, 50), (4, 3, 2, 5)], ids=str)
def test_norms_of_any_shape_and_dtype(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    gradient = torch.randn(shape, dtype=dtype if dtype.is_complex else torch.float64).to(dtype)
    exact = float(gradient.to(torch.complex128 if dtype.is_complex else torch.float64).abs().square().sum().sqrt())
    assert float(_norm(gradient)) == pytest.approx(exact, rel=1e-5)
    if gradient.dim() > 1:
        assert float(_norm(gradient.mT)) == pytest.approx(exact, rel=1e-5)
