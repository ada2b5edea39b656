"""How large a fault inside the attention kernels must be to be seen, in bfloat16: random elements, random kinds.

`scripts/test -m long tests/kernels/test_attention_curve.py -s` prints the table of kernels/attention/README.md.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections import Counter, defaultdict

import pytest
import torch

from resilience.kernels.attention import api
from resilience.kernels.attention.records import Site
from resilience.kernels.attention.tiling import Launch, Tiling
from tests.kernels.attention_cases import Case, bits_of

PRODUCTS = {
    "forward": (Site.SCORES, Site.CONTEXT),
    "dq": (Site.SCORES, Site.DP, Site.DQ),
    "dkdv": (Site.SCORES, Site.DP, Site.DK, Site.DV),
}
"""What a matrix unit computes."""
ELEMENTWISE = {"forward": (Site.PROBS,), "dq": (Site.PROBS, Site.DS), "dkdv": (Site.PROBS, Site.DS)}
"""What is computed from it."""

LARGE = 1e-2
LEAST = 0.999
"""Share of large changes that must be seen."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    length: int
    depth: int
    tile: int
    num_cases: int
    num_trials: int
    """Of each site in each case."""

    def case(self, device: torch.device, number: int) -> Case:
        launch = Launch(self.tile, self.tile, 4, 1)
        tiling = Tiling(forward=launch, dq=launch, dkdv=launch, num_columns=8)
        return Case.random(
            device, length_q=self.length, head_dim=self.depth, causal=number % 2 == 1, seed=number, tiling=tiling
        )


SETTINGS = {
    "32": Setting(length=32, depth=32, tile=16, num_cases=10, num_trials=40),
    "512": Setting(length=512, depth=64, tile=128, num_cases=4, num_trials=15),
}


@dataclasses.dataclass(frozen=True)
class Trial:
    change: float
    """max|ΔY| ÷ rms(Y) of the kernel's results, the largest of them; infinite where a number became none."""
    detected: bool
    late: bool
    """By the backward pass that follows a faulty forward."""


def random_strike(setting: Setting, kernel: str, site: Site, draw: random.Random) -> api.Strike:
    """Anywhere; ×1.5, zero, or any bit but the lowest dozen."""
    bit = draw.randrange(12, 32)
    kind, bits = draw.choice(
        [(2, bits_of(1.5)), (0, 0), (1, -(1 << 31) if bit == 31 else 1 << bit), (1, 1 << draw.randrange(12, 31))]
    )
    of_result = site in (Site.CONTEXT, Site.DQ, Site.DK, Site.DV)
    num_tiles = setting.length // setting.tile
    return api.Strike(
        kernel=kernel, site=site, block=draw.randrange(num_tiles), tile=draw.randrange(num_tiles),
        row=draw.randrange(setting.tile), column=draw.randrange(setting.depth if of_result else setting.tile),
        kind=kind, bits=bits,
    )  # fmt: skip


def change(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    found = [
        float((one.float() - other.float()).abs().max() / other.float().square().mean().sqrt()) for one, other in pairs
    ]
    return max(math.inf if math.isnan(each) else each for each in found)


def strike(case: Case, forward: api.Forward, gradients: api.Gradients, order: api.Strike) -> Trial:
    """Struck at the first attempt, and not repaired."""
    checks, ring = api.Checks(max_repairs=0), api.Ring(case.q.device)
    if order.kernel != "forward":
        faulty = case.backward(forward, checks, ring, strikes=[order])
        results = [(faulty.dq, gradients.dq), (faulty.dk, gradients.dk), (faulty.dv, gradients.dv)]
        return Trial(change(results), bool(ring.drain()[0]), False)
    run = case.forward(checks, ring, strikes=[order])
    detected, size = bool(ring.drain()[0]), change([(run.out, forward.out)])
    if detected or size < LARGE:
        return Trial(size, detected, False)
    case.backward(run, checks, ring)
    late = bool(ring.drain()[0])
    return Trial(size, late, late)


@pytest.mark.long
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("length", SETTINGS)
def test_faults_above_a_hundredth_are_seen(device: torch.device, length: str) -> None:
    setting, draw = SETTINGS[length], random.Random(0)
    found: defaultdict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for number in range(setting.num_cases):
        case = setting.case(device, number)
        forward = case.forward()
        gradients = case.backward(forward)
        for sites in (PRODUCTS, ELEMENTWISE):
            for kernel, site in [(kernel, site) for kernel, members in sites.items() for site in members]:
                for _ in range(setting.num_trials):
                    trial = strike(case, forward, gradients, random_strike(setting, kernel, site, draw))
                    size = "large" if trial.change >= LARGE else "small" if trial.change > 0 else "none"
                    of_site = found[kernel, site.name.lower()]
                    of_site[size] += 1
                    of_site[f"{size} detected"] += trial.detected
                    of_site["late"] += trial.late
    print("\n| kernel | struck | changed by 1e-2 or more | of them seen | of these late | by less | of them seen |")
    for (kernel, name), of_site in found.items():
        columns = ("large", "large detected", "late", "small", "small detected")
        print(f"| {kernel} | {name} |", " | ".join(str(of_site[column]) for column in columns), "|")
    for sites in (PRODUCTS, ELEMENTWISE):
        struck = [found[kernel, site.name.lower()] for kernel, members in sites.items() for site in members]
        large, detected = (sum(of_site[name] for of_site in struck) for name in ("large", "large detected"))
        assert large > 0.25 * sum(map(len, sites.values())) * setting.num_cases * setting.num_trials
        assert detected >= LEAST * large
    # An exponential of the forward alone is seen by nothing but the backward pass.
    late = {struck for struck, of_site in found.items() if of_site["late"]}
    assert late == {("forward", "probs")}
