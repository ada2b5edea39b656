"""The adaptive frequency: targets met at the least cost, budgets kept at the best coverage, impossibilities named."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resilience.abft.adaptive import (
    MIN_SHARE,
    Measured,
    SiteCost,
    coverage,
    for_budget,
    for_target,
    is_due,
    overhead_ratio,
    shares,
    site_costs,
)

QUIET = settings(max_examples=100, deadline=None, derandomize=True, database=None)
RATE = {"rate_per_s": 1e-3, "horizon_steps": 100.0}

sites = st.dictionaries(
    st.sampled_from(["attention.q", "attention.scores", "linear.out", "linear.dgrad", "linear.wgrad"]),
    st.builds(
        SiteCost,
        operation_s=st.floats(1e-4, 10.0),
        check_s=st.floats(0.0, 2.0),
        vulnerability=st.floats(0.0, 1.0),
        power=st.floats(0.5, 1.0),
    ),
    min_size=1,
)
targets = st.floats(0.01, 1.0)


@QUIET
@given(sites, targets)
def test_a_target_is_met_or_said_to_be_out_of_reach(costs: dict[str, SiteCost], target: float) -> None:
    found = for_target(costs, coverage_target=target, **RATE)
    assert all(MIN_SHARE <= share <= 1.0 for share in found.shares.values())
    assert found.coverage == coverage(costs, found.shares, **RATE)
    assert found.overhead_ratio == overhead_ratio(costs, found.shares)
    if found.reachable:
        assert found.coverage >= target * (1.0 - 1e-6)
    else:
        assert coverage(costs, dict.fromkeys(costs, 1.0), **RATE) < target
        assert "out of reach" in found.reason


@QUIET
@given(sites, targets, targets)
def test_a_higher_target_never_lowers_a_share(costs: dict[str, SiteCost], one: float, other: float) -> None:
    low, high = (for_target(costs, coverage_target=target, **RATE).shares for target in sorted((one, other)))
    assert all(low[site] <= high[site] * (1.0 + 1e-9) for site in costs)


@QUIET
@given(sites, targets, st.floats(1.0, 100.0))
def test_a_higher_rate_never_lowers_a_share(costs: dict[str, SiteCost], target: float, factor: float) -> None:
    low = for_target(costs, coverage_target=target, rate_per_s=1e-4, horizon_steps=100.0).shares
    high = for_target(costs, coverage_target=target, rate_per_s=1e-4 * factor, horizon_steps=100.0).shares
    assert all(low[site] <= high[site] * (1.0 + 1e-9) for site in costs)


@QUIET
@given(sites, st.floats(0.0, 1.0), st.floats(0.0, 1.0))
def test_a_budget_is_kept_or_said_to_be_too_small_and_more_of_it_never_covers_less(
    costs: dict[str, SiteCost], one: float, other: float
) -> None:
    small, large = (for_budget(costs, budget_ratio=budget, **RATE) for budget in sorted((one, other)))
    for found, budget in ((small, min(one, other)), (large, max(one, other))):
        assert all(MIN_SHARE <= share <= 1.0 for share in found.shares.values())
        if found.reachable:
            assert found.overhead_ratio <= budget * (1.0 + 1e-9)
        else:
            assert {found.shares[site] for site, cost in costs.items() if cost.check_s} == {MIN_SHARE}
            assert "above the budget" in found.reason
    assert small.coverage <= large.coverage * (1.0 + 1e-12)


@QUIET
@given(sites, st.floats(0.05, 0.95))
def test_no_grid_of_shares_is_cheaper_than_the_greedy_choice(costs: dict[str, SiteCost], target: float) -> None:
    found = for_target(costs, coverage_target=target, **RATE)
    if not found.reachable:
        return
    for grid in itertools.product((MIN_SHARE, 0.3, 0.6, 1.0), repeat=len(costs)):
        other = dict(zip(costs, grid, strict=True))
        if coverage(costs, other, **RATE) >= target:
            assert overhead_ratio(costs, other) >= found.overhead_ratio * (1.0 - 1e-9)


@QUIET
@given(sites, st.floats(0.0, 0.5))
def test_no_grid_of_shares_covers_more_within_the_budget(costs: dict[str, SiteCost], budget: float) -> None:
    found = for_budget(costs, budget_ratio=budget, **RATE)
    for grid in itertools.product((MIN_SHARE, 0.3, 0.6, 1.0), repeat=len(costs)):
        other = dict(zip(costs, grid, strict=True))
        if overhead_ratio(costs, other) <= budget:
            assert coverage(costs, other, **RATE) <= found.coverage * (1.0 + 1e-9)


def test_the_best_worth_is_checked_first() -> None:
    costs = {
        "cheap": SiteCost(operation_s=1.0, check_s=0.01),
        "dear": SiteCost(operation_s=1.0, check_s=0.5),
        "harmless": SiteCost(operation_s=1.0, check_s=0.01, vulnerability=0.0),
    }
    found = for_budget(costs, budget_ratio=0.02, **RATE).shares
    assert found["cheap"] == 1.0
    assert MIN_SHARE < found["dear"] < 0.2
    assert found["harmless"] == MIN_SHARE


def test_without_faults_every_site_keeps_the_least_share() -> None:
    costs = {"linear.out": SiteCost(operation_s=1.0, check_s=0.1)}
    found = for_target(costs, coverage_target=0.999, rate_per_s=0.0, horizon_steps=1e6)
    assert found.shares == {"linear.out": MIN_SHARE}
    assert found.reachable
    assert found.coverage == 1.0


def test_hours_become_steps_and_the_budget_wins_over_the_target() -> None:
    costs = {
        "linear.out": SiteCost(operation_s=0.5, check_s=0.05),
        "attention.probs": SiteCost(operation_s=0.5, check_s=0.1),
    }
    options = {"coverage_target": 0.95, "rate_per_hour": 1e-6, "horizon_hours": 1e6, "step_s": 1.0}
    found = shares(costs, **options)
    # One fault is expected: 5 % of it may be missed, −ln 0.95 = 0.0513 of the time stays unchecked, of the dearer site.
    assert found.shares["linear.out"] == 1.0
    assert found.shares["attention.probs"] == pytest.approx(1.0 + math.log(0.95) / 0.5)
    assert found.reachable
    tight = shares(costs, **options, budget_ratio=0.06)
    assert not tight.reachable
    assert tight.overhead_ratio == pytest.approx(0.06)
    assert "0.95 would cost 0.1397" in tight.reason


def test_a_product_and_its_gradients_have_one_share() -> None:
    costs = {
        "attention.q": SiteCost(operation_s=0.25, check_s=0.01),
        "linear.dgrad": SiteCost(operation_s=0.25, check_s=0.1),
        "attention.scores": SiteCost(operation_s=0.25, check_s=0.3),
        "attention.dk": SiteCost(operation_s=0.25, check_s=0.3),
    }
    options = {"coverage_target": 0.7, "rate_per_hour": 1e-6, "horizon_hours": 1e6, "step_s": 1.0}
    found = shares(costs, **options)
    assert found.shares["attention.q"] == found.shares["linear.dgrad"] == 1.0
    # −ln 0.7 = 0.357 of the time may stay unchecked: it is of the dearer pair, which takes half of it.
    assert found.shares["attention.scores"] == found.shares["attention.dk"] == pytest.approx(1.0 + math.log(0.7) / 0.5)
    assert found.coverage == pytest.approx(coverage(costs, found.shares, rate_per_s=1e-6 / 3600, horizon_steps=3.6e9))
    assert found.overhead_ratio == pytest.approx(overhead_ratio(costs, found.shares))


def test_costs_come_from_what_was_counted() -> None:
    measured = {
        "a": Measured(num_calls=40, num_checks=10, operation_s=8.0, check_s=0.5),
        "unchecked": Measured(num_calls=4, num_checks=0, operation_s=2.0, check_s=0.0),
        "never": Measured(num_calls=0, num_checks=0, operation_s=0.0, check_s=0.0),
    }
    found = site_costs(measured, num_steps=4, vulnerabilities={"a": 0.25})
    assert found == {
        "a": SiteCost(operation_s=2.0, check_s=0.5, vulnerability=0.25),
        "unchecked": SiteCost(operation_s=0.5, check_s=0.0),
    }


@pytest.mark.parametrize("per_step", [1, 2, 6, 12, 13, 24, 32, 40, 55, 89, 96, 144, 377])
@pytest.mark.parametrize("share", [1 / 64, 0.25, 0.5, 0.9])
def test_no_call_of_a_step_is_passed_over_for_long(per_step: int, share: float) -> None:
    """Multiples of the golden ratio did that wherever a step had a Fibonacci number of calls."""
    num_steps = 2_000
    due = [is_due(call, share, seed=7) for call in range(num_steps * per_step)]
    assert sum(due) / len(due) == pytest.approx(share, abs=6 * math.sqrt(share * (1 - share) / len(due)))
    # A gap of g steps has a probability of (1 − share)^g: this one happens in 1e-6 of all runs.
    longest_allowed = math.log(1e-6 / len(due)) / math.log(1.0 - share)
    for layer in range(per_step):
        gaps = "".join("x" if one else "." for one in due[layer::per_step]).split("x")
        assert max(map(len, gaps)) <= longest_allowed


def test_a_share_of_1_checks_all_and_another_seed_other_calls() -> None:
    assert all(is_due(call, 1.0) for call in range(100))
    chosen = {tuple(is_due(call, 0.5, seed) for call in range(64)) for seed in range(100)}
    assert len(chosen) == 100


@QUIET
@given(sites)
def test_a_target_of_1_is_reached_by_checking_all(costs: dict[str, SiteCost]) -> None:
    found = for_target(costs, coverage_target=1.0, **RATE)
    assert set(found.shares.values()) <= {1.0}
    assert found.reachable is all(cost.power == 1.0 or cost.vulnerability == 0.0 for cost in costs.values())


def test_what_costs_nothing_is_checked_however_tight_the_budget() -> None:
    costs = {"dear": SiteCost(operation_s=1.0, check_s=10.0), "free": SiteCost(operation_s=1.0, check_s=0.0)}
    found = for_budget(costs, budget_ratio=0.01, rate_per_s=1e-6, horizon_steps=1.0)
    assert found.shares == {"dear": MIN_SHARE, "free": 1.0}
    assert not found.reachable


def test_costs_are_those_since_the_last_solution() -> None:
    before = Measured(num_calls=40, num_checks=10, operation_s=8.0, check_s=0.5)
    now = Measured(num_calls=60, num_checks=10, operation_s=9.0, check_s=0.5)
    since = now - before
    assert since == Measured(num_calls=20, num_checks=0, operation_s=1.0, check_s=0.0)
    found = site_costs({"a": since}, num_steps=10, check_s={"a": 0.05})
    assert found == {"a": SiteCost(operation_s=0.1, check_s=pytest.approx(0.1))}
