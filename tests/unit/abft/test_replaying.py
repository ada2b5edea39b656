"""A replay looks at everything, at once, on every device: else a lasting fault seems gone, or round-off a fault."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from resilience.abft.checksum import deferred_residual
from resilience.abft.expectation import Expectations
from resilience.abft.gemm import Gemm
from resilience.abft.probabilities import screen_gradient
from resilience.abft.record import Record
from resilience.abft.sums import WeightSums
from resilience.abft.thresholds import UNCONFIRMED

TOKENS = torch.arange(2 * 24).reshape(2, 24) % 50


def attempt(protection: Any, model: Any, step: int, number: int) -> int:
    """Runs one attempt of a step; how many operations were checked."""
    before = sum(protection.checks().values())
    protection.begin_micro_step(step, 0, number)
    with protection.active():
        model(TOKENS).backward()
    return sum(protection.checks().values()) - before


@pytest.fixture
def as_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results wait for the boundary, as they do on a GPU."""
    monkeypatch.setattr(Record, "reads_at_once", lambda record, result: record.replaying)


@pytest.mark.parametrize("sdpa", [False, True], ids=["eager", "sdpa"])
@pytest.mark.parametrize("share", [0.25, "adaptive"])
def test_everything_is_checked_in_a_replay_whatever_the_share(
    share: Any, sdpa: bool, gpt: Any, protect: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("secrets.randbits", lambda _: 3)
    model = gpt(sdpa=sdpa, dropout=0.0)
    everything = protect()
    everything.attach(model)
    num_operations = attempt(everything, model, 1, 0)
    everything.uninstall()
    protection = protect(share=share, fault_rate_per_hour=1e-30)
    protection.attach(model)
    for step in range(1, 8):
        attempt(protection, model, step, 0)
    assert attempt(protection, model, 8, 0) < num_operations / 2
    assert attempt(protection, model, 8, 1) == num_operations
    assert attempt(protection, model, 9, 0) < num_operations / 2, "the next step has its share again"


@pytest.mark.parametrize("layer", range(5))
def test_a_lasting_fault_is_seen_by_every_replay(
    layer: int, gpt: Any, protect: Any, striker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("secrets.randbits", lambda _: 3)
    model = gpt(dropout=0.0)
    protection = protect(share=0.25)
    protection.attach(model)

    def broken(tensor: torch.Tensor) -> None:
        tensor.view(-1)[7] += 100.0

    striker.arm("linear.out", layer, broken, repeat=10**6)
    num_seen = 0
    for step in range(1, 33):
        attempt(protection, model, step, 0)
        if not any(not finding.mended for finding in protection.drain()):
            continue
        num_seen += 1
        for number in (1, 2):
            attempt(protection, model, step, number)
            assert any((found.site, found.layer) == ("linear.out", layer) for found in protection.drain())
    assert 0 < num_seen < 32, "a share is a share"


@pytest.mark.usefixtures("as_on_a_device")
@pytest.mark.parametrize("site", ["attention.q", "attention.probs", "attention.ds", "linear.wgrad"])
def test_on_a_device_a_fault_that_comes_again_is_mended_in_the_replay(
    site: str, gpt: Any, protect: Any, striker: Any
) -> None:
    model = gpt(dropout=0.0, fused_projection=False)
    protection = protect()
    protection.attach(model)

    def struck(tensor: torch.Tensor) -> None:
        tensor.view(-1)[7] += 100.0

    striker.arm(site, 0, struck, repeat=2)
    attempt(protection, model, 1, 0)
    assert (site, False) in [(finding.site, finding.mended) for finding in protection.drain()]
    attempt(protection, model, 1, 1)
    assert [(finding.site, finding.mended) for finding in protection.drain()] == [(site, True)]


@pytest.mark.usefixtures("as_on_a_device")
def test_on_a_device_round_off_is_dismissed_in_the_replay(protect: Any) -> None:
    """Rows that cancel by a factor of thousands: what is left is round-off, and no fault."""
    generator = torch.Generator().manual_seed(0)
    half = torch.randn(64, 256, generator=generator)
    one = torch.cat([half, -half], dim=1)
    other = torch.randn(256, 96, generator=generator).repeat(2, 1)
    other += 1e-6 * torch.randn(512, 96, generator=generator)
    protection = protect()
    protection.begin_micro_step(1, 0, 0)
    with protection.active():
        one @ other
    (suspicion,) = protection.drain()
    assert suspicion.residual_ratio > 1.0
    protection.begin_micro_step(1, 0, 1)
    with protection.active():
        one @ other
    assert protection.drain() == []


@pytest.mark.parametrize("rms", [1e-2, 3e-6, 1e-6, 1e-7, 1e-9])
def test_small_numbers_of_float16_are_no_alarm_without_a_second_stage(rms: float) -> None:
    """Below 6e-5 its elements are multiples of 6e-8: their round-off does not shrink with them."""
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(200, 96, generator=generator).half()
    right = (torch.randn(96, 300, generator=generator) * rms / 96**0.5 * 64).half() / 64
    out = left @ right
    expectation = Expectations(WeightSums()).alone(Gemm(left, right), out)
    observed = expectation.observed(out)
    ratio, bad = deferred_residual(
        expectation.gemm, expectation.sums, observed, out.dtype, factor_scale=UNCONFIRMED
    ).tolist()
    assert ratio <= 1.0
    assert not bad
    out[3, 5] += 50.0 * rms + 1e-3
    struck = expectation.observed(out)
    assert deferred_residual(expectation.gemm, expectation.sums, struck, out.dtype)[0] > 1.0


@pytest.mark.parametrize("rms", [1e-3, 2e-6, 2e-7, 1e-9])
def test_small_gradients_of_a_float16_softmax_are_no_alarm(rms: float) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(40, 300, generator=generator).softmax(-1).half()
    incoming = (torch.randn(40, 300, generator=generator) * rms * 300).half()
    gradient = torch.ops.aten._softmax_backward_data(incoming, weights, -1, torch.float16)
    assert float(screen_gradient(gradient).max()) <= UNCONFIRMED
