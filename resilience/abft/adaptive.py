"""How often to check: the share of each site's calls that reaches a target at the least cost, or the most for a budget.

Pure: numbers in, numbers out; no clock, no tensors, no state. After ATTNChecker's adaptive detection frequency (arXiv
2410.11720): an error rate as a Poisson process, a vulnerability and a cost for each section, and a greedy choice by
coverage per unit of time. [M] The paper states it for three sections of attention and for errors per GEMM; its exact
expressions could not be verified. What is used here is this:

Faults strike site s as a Poisson process of rate λ·e_s a step: λ faults an hour of execution, e_s the hours that the
site's operations take in a step (time stands for work; FLOPs and a rate per FLOP would do as well).
A share v_s of them would harm training, its *vulnerability*. A check that is made finds a share p_s of those. With f_s
the share of the site's calls that is checked, thinning the process leaves harmful faults that nobody sees at a rate of

    missed(f) = Σ_s λ·e_s·v_s·(1 − p_s·f_s)                                     (faults a step)

* **Coverage** is the probability that none is missed within a horizon of so many steps: exp(−horizon·missed(f)).
* **Overhead** is Σ_s c_s·f_s ÷ Σ_s e_s, with c_s the seconds a step that checking every call would take.

Target: minimise the overhead subject to coverage ≥ target. Budget: maximise coverage subject to overhead ≤ budget. Both
are fractional knapsacks, for which the greedy choice by λ·e_s·v_s·p_s ÷ c_s is optimal, the last site in part. Every
site keeps at least `min_share`: a share of 0 would end the measurement of its cost, and never find broken hardware.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

__all__ = [
    "GROUPS",
    "MIN_SHARE",
    "Measured",
    "SiteCost",
    "Solution",
    "coverage",
    "for_budget",
    "for_target",
    "is_due",
    "overhead_ratio",
    "shares",
    "site_costs",
]

MIN_SHARE = 1.0 / 64.0
"""Share of a site's calls that is always checked."""

GROUPS: tuple[tuple[str, ...], ...] = (
    ("linear.out", "attention.q", "attention.k", "attention.v", "attention.out", "linear.dgrad", "linear.wgrad"),
    ("attention.scores", "attention.dq", "attention.dk"),
    ("attention.context", "attention.dp", "attention.dv"),
)
"""Sites that have one share: a product's gradients are checked if the product is, for that costs a pass less."""

_WORD = 1 << 64
_STRIDE = 0x9E3779B97F4A7C15


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What was counted at one site over some steps."""

    num_calls: int
    num_checks: int
    operation_s: float
    """Of all calls."""
    check_s: float
    """Of the checks that were made."""

    def __sub__(self, earlier: Measured) -> Measured:
        """What was counted since `earlier`."""
        return Measured(
            num_calls=self.num_calls - earlier.num_calls,
            num_checks=self.num_checks - earlier.num_checks,
            operation_s=self.operation_s - earlier.operation_s,
            check_s=self.check_s - earlier.check_s,
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SiteCost:
    """What is known of one site: measured times, and how much its faults matter."""

    operation_s: float
    """Seconds that the site's operations take in a step."""
    check_s: float
    """Seconds that checking every one of them takes in a step."""
    vulnerability: float = 1.0
    """Share of its faults that would harm training; 1 where it was not measured."""
    power: float = 1.0
    """Share of those that a check finds."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """The shares, and what they give."""

    shares: Mapping[str, float]
    """Of each site, from 0 to 1."""
    coverage: float
    """Probability that no harmful fault is missed within the horizon."""
    overhead_ratio: float
    """Seconds of checking ÷ seconds of the operations that are checked."""
    reachable: bool
    """Whether the target is met, or the budget is kept."""
    reason: str
    """In words."""


def site_costs(
    measured: Mapping[str, Measured],
    *,
    num_steps: int,
    check_s: Mapping[str, float] | None = None,
    vulnerabilities: Mapping[str, float] | None = None,
) -> dict[str, SiteCost]:
    """Costs a step; sites that were never called are left out.

    Args:
        measured: what was counted over the steps.
        num_steps: how many.
        check_s: seconds of one check where none was made in them. What is not known counts as free to check, so that
            it will be.
        vulnerabilities: of the sites, 1 where none is given.
    """
    found = {}
    for site, one in measured.items():
        if one.num_calls:
            each_s = one.check_s / one.num_checks if one.num_checks else (check_s or {}).get(site, 0.0)
            found[site] = SiteCost(
                operation_s=one.operation_s / num_steps,
                check_s=each_s * one.num_calls / num_steps,
                vulnerability=(vulnerabilities or {}).get(site, 1.0),
            )
    return found


def coverage(
    costs: Mapping[str, SiteCost], shares: Mapping[str, float], *, rate_per_s: float, horizon_steps: float
) -> float:
    """Probability that no harmful fault is missed within `horizon_steps`."""
    return math.exp(-rate_per_s * horizon_steps * _exposed(costs, shares))


def _exposed(costs: Mapping[str, SiteCost], shares: Mapping[str, float]) -> float:
    """Seconds a step in which a fault would harm and not be seen."""
    return math.fsum(
        cost.operation_s * cost.vulnerability * (1.0 - cost.power * shares[site]) for site, cost in costs.items()
    )


def overhead_ratio(costs: Mapping[str, SiteCost], shares: Mapping[str, float]) -> float:
    """Seconds of checking ÷ seconds of the operations; 0 without operations."""
    operations = math.fsum(cost.operation_s for cost in costs.values())
    return math.fsum(cost.check_s * shares[site] for site, cost in costs.items()) / operations if operations else 0.0


def for_target(
    costs: Mapping[str, SiteCost],
    *,
    coverage_target: float,
    rate_per_s: float,
    horizon_steps: float,
    min_share: float = MIN_SHARE,
) -> Solution:
    """The cheapest shares whose coverage is at least the target.

    Args:
        costs: of each site.
        coverage_target: probability that no harmful fault is missed, below 1 (1 checks everything).
        rate_per_s: faults a second of the operations' time.
        horizon_steps: steps that the target is for.
        min_share: share that every site keeps.
    """
    allowed = math.inf
    if rate_per_s * horizon_steps > 0.0:
        allowed = -math.log(coverage_target) / (rate_per_s * horizon_steps)
    weights = _weights(costs)
    found = dict.fromkeys(costs, min_share if coverage_target < 1.0 else 1.0)
    lacking = _exposed(costs, found) - allowed
    for site in _by_worth(costs, weights):
        gain = weights[site] * (1.0 - min_share)
        if lacking <= 0.0 or coverage_target >= 1.0:
            break
        # Rounded up in the last place: the target is met, not nearly met.
        found[site] = 1.0 if gain <= lacking else min(1.0, (min_share + lacking / weights[site]) * (1.0 + 1e-12))
        lacking -= gain
    reached = coverage(costs, found, rate_per_s=rate_per_s, horizon_steps=horizon_steps)
    overhead = overhead_ratio(costs, found)
    is_met = _exposed(costs, found) <= allowed * (1.0 + 1e-9)
    reason = f"coverage {reached:.6g} for a target of {coverage_target:g} at an overhead of {overhead:.4f}"
    if not is_met:
        reason = f"coverage {reached:.6g} is the most that checks give; a target of {coverage_target:g} is out of reach"
    return Solution(shares=found, coverage=reached, overhead_ratio=overhead, reachable=is_met, reason=reason)


def for_budget(
    costs: Mapping[str, SiteCost],
    *,
    budget_ratio: float,
    rate_per_s: float,
    horizon_steps: float,
    min_share: float = MIN_SHARE,
) -> Solution:
    """The shares with the best coverage whose overhead is within the budget; see `for_target`."""
    weights = _weights(costs)
    found = dict.fromkeys(costs, min_share)
    left = budget_ratio * math.fsum(cost.operation_s for cost in costs.values())
    left -= math.fsum(cost.check_s * min_share for cost in costs.values())
    for site in _by_worth(costs, weights):
        rest = costs[site].check_s * (1.0 - min_share)
        if rest <= max(left, 0.0):  # what costs nothing is checked, however little is left
            found[site] = 1.0
            left -= rest
        elif left > 0.0:
            found[site] = min_share + left / costs[site].check_s
            break
    reached = coverage(costs, found, rate_per_s=rate_per_s, horizon_steps=horizon_steps)
    overhead = overhead_ratio(costs, found)
    kept = overhead <= budget_ratio * (1.0 + 1e-9)
    reason = f"coverage {reached:.6g} at an overhead of {overhead:.4f}, budget {budget_ratio:g}"
    if not kept:
        reason = f"checking {min_share:.3g} of every site costs {overhead:.4f}, above the budget of {budget_ratio:g}"
    return Solution(shares=found, coverage=reached, overhead_ratio=overhead, reachable=kept, reason=reason)


def shares(
    costs: Mapping[str, SiteCost],
    *,
    coverage_target: float,
    rate_per_hour: float,
    horizon_hours: float,
    step_s: float,
    budget_ratio: float | None = None,
    min_share: float = MIN_SHARE,
) -> Solution:
    """The shares for the next steps: the target at the least cost; the best within the budget where it costs more.

    Args:
        costs: of each site, a step.
        coverage_target: probability that no harmful fault is missed within the horizon.
        rate_per_hour: faults an hour of the operations' time on this device.
        horizon_hours: hours that the target is for.
        step_s: seconds of a step, which turn hours into steps.
        budget_ratio: largest overhead; None for no limit.
        min_share: share that every site keeps.
    """
    rate_per_s = rate_per_hour / 3600.0
    horizon_steps = horizon_hours * 3600.0 / step_s
    leaders = _leaders(costs)
    costs = {
        leader: _together([costs[site] for site in costs if leaders[site] == leader]) for leader in leaders.values()
    }
    wanted = for_target(
        costs, coverage_target=coverage_target, rate_per_s=rate_per_s, horizon_steps=horizon_steps, min_share=min_share
    )
    if budget_ratio is None or wanted.overhead_ratio <= budget_ratio:
        return _spread(wanted, leaders)
    best = for_budget(
        costs, budget_ratio=budget_ratio, rate_per_s=rate_per_s, horizon_steps=horizon_steps, min_share=min_share
    )
    best = _spread(best, leaders)
    if best.coverage >= coverage_target and best.reachable:
        return best
    reason = f"{best.reason}; the target of {coverage_target:g} would cost {wanted.overhead_ratio:.4f}"
    return dataclasses.replace(best, reachable=False, reason=reason)


def _leaders(costs: Mapping[str, SiteCost]) -> dict[str, str]:
    """The first site of its group that was called, for each site."""
    found = {}
    for site in costs:
        group = next((group for group in GROUPS if site in group), (site,))
        found[site] = next(member for member in group if member in costs)
    return found


def _together(costs: list[SiteCost]) -> SiteCost:
    """Several sites as one; what matters of them is weighted by their time."""
    operation_s = math.fsum(cost.operation_s for cost in costs)
    weight = operation_s or 1.0
    return SiteCost(
        operation_s=operation_s,
        check_s=math.fsum(cost.check_s for cost in costs),
        vulnerability=math.fsum(c.vulnerability * c.operation_s for c in costs) / weight if operation_s else 1.0,
        power=math.fsum(c.power * c.operation_s for c in costs) / weight if operation_s else 1.0,
    )


def _spread(solution: Solution, leaders: Mapping[str, str]) -> Solution:
    """Each site of a group has the group's share."""
    return dataclasses.replace(solution, shares={site: solution.shares[leader] for site, leader in leaders.items()})


def is_due(call: int, share: float, seed: int = 0) -> bool:
    """Whether call number `call` (from 0) of a site is among the share that is checked.

    By a hash (Steele, Lea & Flood, SplitMix64, OOPSLA 2014): any regular spacing, that by multiples of the golden ratio
    included, meets some number of calls a step with which one layer is passed over for hundreds of steps.

    Args:
        call: number of the call.
        share: of the calls.
        seed: of 64 bits; another one chooses other calls.
    """
    if share >= 1.0:
        return True
    mixed = (seed + (call + 1) * _STRIDE) % _WORD
    mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 % _WORD
    mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB % _WORD
    return (mixed ^ (mixed >> 31)) < share * _WORD


def _weights(costs: Mapping[str, SiteCost]) -> dict[str, float]:
    """What checking all calls of each site takes off the exposed seconds of a step."""
    return {site: cost.operation_s * cost.vulnerability * cost.power for site, cost in costs.items()}


def _by_worth(costs: Mapping[str, SiteCost], weights: Mapping[str, float]) -> list[str]:
    """Sites by coverage per second, the best first; those that gain nothing are left out."""
    useful = [site for site in costs if weights[site] > 0.0]
    return sorted(useful, key=lambda site: (costs[site].check_s / weights[site], site))
