"""What counts as a spike of the loss, and what never does."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilience.events import Check, DetectionKind
from resilience.guard.loss import LossHistory

CLEAN_STEP, NOW = 7, 100.0


def history(losses: list[float], factor: float = 6.0) -> LossHistory:
    made = LossHistory(factor)
    for step, loss in enumerate(losses, start=1):
        made.add(step, loss)
    return made


def is_spike(made: LossHistory, loss: float) -> bool:
    return bool(made.findings(loss, clean_step=CLEAN_STEP, now=NOW))


FALLING = [4.0 - 0.02 * step + 0.05 * math.sin(step) for step in range(40)]


def test_a_loss_out_of_all_proportion_is_an_alarm_with_its_clean_step() -> None:
    (finding,) = history(FALLING).findings(9.0, clean_step=CLEAN_STEP, now=NOW)
    assert (finding.check, finding.kind, finding.clean_step) == (Check.LOSS, DetectionKind.LOSS_SPIKE, CLEAN_STEP)
    assert finding.residual_ratio > 1


def test_what_goes_on_as_before_is_none() -> None:
    made = history(FALLING)
    assert not any(is_spike(made, loss) for loss in (3.0, 3.4, 0.1))


def test_it_is_silent_at_first_when_off_and_about_what_is_not_finite() -> None:
    assert not is_spike(history(FALLING[:15]), 1e9)
    assert is_spike(history(FALLING[:16]), 1e9)
    assert not is_spike(history(FALLING, factor=0.0), 1e9)
    assert not is_spike(history(FALLING), math.nan)
    assert not is_spike(history(FALLING), math.inf)


def test_losses_that_hardly_move_make_no_hair_a_spike() -> None:
    assert not is_spike(history([2.0] * 30), 2.0 + 1e-6)


def test_one_spike_does_not_hide_the_next() -> None:
    assert is_spike(history([*FALLING, 50.0]), 50.0)


def test_after_a_rewind_the_later_losses_are_forgotten() -> None:
    made = history([*FALLING, *[50.0] * 60])
    assert not is_spike(made, 50.0)
    made.rewound(40)
    for step in range(41, 60):
        made.add(step, 3.2)
    assert is_spike(made, 50.0)


losses = st.floats(0.1, 20.0)


@given(st.lists(losses, min_size=16, max_size=64), losses, st.floats(0.01, 100.0))
def test_the_score_knows_no_scale(seen: list[float], loss: float, scale: float) -> None:
    first = history(seen).score(loss)
    second = history([scale * each for each in seen]).score(scale * loss)
    assert second == pytest.approx(first, rel=1e-6, abs=1e-6)


@given(st.lists(losses, min_size=16, max_size=64), losses, losses)
def test_a_larger_loss_never_scores_less(seen: list[float], one: float, other: float) -> None:
    made = history(seen)
    low, high = sorted((one, other))
    assert made.score(low) <= made.score(high)
