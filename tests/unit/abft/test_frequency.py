"""`share = "adaptive"` in a protection: everything is measured first, then each site gets the share that it needs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from resilience.abft.adaptive import MIN_SHARE, Measured
from resilience.abft.frequency import MEASURED_STEPS, STEPS_BETWEEN, Frequency
from resilience.config import DetectionConfig
from resilience.testing import FakeClock


def test_shares_are_set_after_the_measured_steps_and_again_now_and_then() -> None:
    clock = FakeClock()
    used: list[Any] = []
    num_steps = 0

    def measured() -> dict[str, Measured]:
        one = Measured(num_calls=num_steps, num_checks=num_steps, operation_s=1.0 * num_steps, check_s=0.1 * num_steps)
        return {"linear.out": one}

    frequency = Frequency(
        DetectionConfig(share="adaptive", coverage_target=0.9, overhead_budget_ratio=0.05),
        measured=measured,
        use=used.append,
        clock=clock,
    )
    for _ in range(MEASURED_STEPS):
        frequency.step_begins()
        clock.advance(2.0 if num_steps else 60.0)  # the first one warms up
        num_steps += 1
    assert not used
    assert frequency.solution is None
    for _ in range(STEPS_BETWEEN + 1):
        frequency.step_begins()
        clock.advance(2.0)
        num_steps += 1
    assert [shares["linear.out"] for shares in used] == [pytest.approx(0.5)] * 2
    assert frequency.solution is not None
    assert "0.9" in frequency.solution.reason


def test_a_protected_model_checks_less_once_costs_are_known(gpt: Any, protect: Any) -> None:
    """No fault is expected to speak of, so that every site falls to the least share."""
    model = gpt(layers=2)
    protection = protect(share="adaptive", fault_rate_per_hour=1e-30)
    protection.attach(model)
    tokens = torch.randint(50, (1, 8), generator=torch.Generator().manual_seed(0))

    def run(step: int) -> int:
        before = sum(protection.checks().values())
        protection.begin_micro_step(step, 0, 0)
        with protection.active():
            model(tokens).backward()
        return sum(protection.checks().values()) - before

    counts = [run(step) for step in range(1, MEASURED_STEPS + 5)]
    assert len(set(counts[:MEASURED_STEPS])) == 1
    assert counts[0] > 20
    assert sum(counts[MEASURED_STEPS:]) < counts[0] / 2
    assert protection.frequency is not None
    assert set(protection.frequency.shares.values()) == {MIN_SHARE}


@pytest.mark.parametrize("site", ["attention.q", "attention.context", "linear.wgrad"])
def test_what_a_fault_costs_is_no_cost_of_a_check(site: str, gpt: Any, protect: Any, striker: Any) -> None:
    """Else the dearest site, looked at least, would be the one that errs."""
    clock = FakeClock()
    model = gpt(layers=2, sdpa=True)
    protection = protect(clock=clock, max_mends=2)
    protection.attach(model)

    def corrupt(tensor: torch.Tensor) -> None:
        tensor[(0,) * tensor.dim()] = float("inf")
        clock.advance(10.0)  # of the operation, and of each time it is run again

    striker.arm(site, 0, corrupt, repeat=2)
    protection.begin_micro_step(1, 0, 0)
    with protection.active():
        model(torch.randint(50, (1, 8), generator=torch.Generator().manual_seed(0))).backward()
    assert [finding.mended for finding in protection.drain()] == [True]
    assert protection._record.check_seconds == pytest.approx(10.0)
    assert all(one.check_s == pytest.approx(0.0) for one in protection._record.measured().values())


def test_a_device_that_works_apart_from_the_host_is_checked_throughout(gpt: Any, protect: Any, caplog: Any) -> None:
    """The host's clock sees launches there, and shares by them would be worth nothing."""
    protection = protect(share="adaptive", fault_rate_per_hour=1e-30)
    protection.attach(torch.nn.Linear(2, 2, device="meta"))
    assert "adaptive" in caplog.text
    assert "every call is checked" in caplog.text
    model = gpt(layers=1)
    protection.attach(model)
    counts = []
    for step in range(1, MEASURED_STEPS + 3):
        protection.begin_micro_step(step, 0, 0)
        with protection.active():
            model(torch.zeros(1, 8, dtype=torch.int64)).backward()
        counts.append(sum(protection.checks().values()))
    assert protection.frequency is None
    assert counts[-1] == counts[0] * len(counts)


def test_ratios_are_told_with_their_site_alarms_and_dismissed_ones_too(gpt: Any, protect: Any, striker: Any) -> None:
    told: list[tuple[str, float, bool]] = []
    model = gpt(layers=1)
    protection = protect()
    protection.attach(model)
    protection.tell_ratios(lambda site, ratio, alarm: told.append((site, ratio, alarm)))
    striker.arm("attention.scores", 0, lambda tensor: tensor.fill_(3.0))
    protection.begin_micro_step(1, 0, 0)
    with protection.active():
        model(torch.randint(50, (1, 8), generator=torch.Generator().manual_seed(0))).backward()
    assert len(told) == sum(protection.checks().values())
    assert [(site, ratio > 1.0) for site, ratio, alarm in told if alarm] == [("attention.scores", True)]
    assert all(ratio <= 1.0 for _, ratio, alarm in told if not alarm)


def test_a_profile_sharpens_the_first_stage_only(gpt: Any, protect: Any, tmp_path: Any) -> None:
    (tmp_path / "profile.toml").write_text('[site."linear.out"]\nscale = 1e-6\n')
    told: list[tuple[str, float, bool]] = []
    model = gpt(layers=1)
    protection = protect(profile=str(tmp_path / "profile.toml"))
    protection.attach(model)
    protection.tell_ratios(lambda site, ratio, alarm: told.append((site, ratio, alarm)))
    protection.begin_micro_step(1, 0, 0)
    with protection.active():
        model(torch.randint(50, (1, 8), generator=torch.Generator().manual_seed(0))).backward()
    assert protection.drain() == []
    assert all(ratio > 1.0 for site, ratio, _ in told if site == "linear.out")
    assert all(ratio <= 1.0 for site, ratio, _ in told if site != "linear.out")
