"""Faults struck inside the attention kernels: seen, recorded, repaired bit by bit; what cannot be repaired is said."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from resilience.kernels.attention import api
from resilience.kernels.attention.records import CheckBit, FaultRecord, Site, Verdict
from resilience.kernels.attention.tiling import Launch, Tiling
from tests.kernels.attention_cases import Case, bits_of
from tests.kernels.launching import launching

KINDS = {
    "inf": (0, bits_of(math.inf)),
    "nan": (0, bits_of(math.nan)),
    "zero": (0, 0),
    "x1.5": (2, bits_of(1.5)),
    **{f"bit {bit}": (1, -(1 << 31) if bit == 31 else 1 << bit) for bit in (31, 30, 27, 23, 22)},
}
"""Kind and bits of an `api.Strike`."""

BLOCK, TILE = 1, 0
ROWS, COLUMNS = slice(16, 24), slice(0, 16)
"""The second tile of queries (forward, dq) and the first tile of keys, or the other way around (dkdv)."""

IN_FORWARD = {
    Site.SCORES: CheckBit.SCORES,
    Site.ROW_SUM: CheckBit.ROW_SUM,
    Site.CONTEXT: CheckBit.CONTEXT,
}
IN_DQ = {
    Site.SCORES: CheckBit.MASS,
    Site.PROBS: CheckBit.MASS,
    Site.DP: CheckBit.DP_ROWS,
    Site.DS: CheckBit.DS_ROWS,
    Site.DQ: CheckBit.DQ,
}
IN_DKDV = {
    Site.SCORES: CheckBit.SCORES_AGAIN,
    Site.PROBS: CheckBit.QUOTIENT,
    Site.DP: CheckBit.DP,
    Site.DS: CheckBit.QUOTIENT,
    Site.DK: CheckBit.DK,
    Site.DV: CheckBit.DV,
}
"""Which check must see a fault at a site."""


@pytest.fixture(scope="module")
def case(device: torch.device) -> Case:
    return Case.random(device, seed=5)


@pytest.fixture(scope="module")
def clean(device: torch.device, case: Case) -> tuple[api.Forward, api.Gradients]:
    with launching(device):
        run = case.forward()
        return run, case.backward(run)


def weightiest(case: Case, kernel: str, site: Site) -> tuple[int, int]:
    """Row and column, in the tile that is struck, of the element whose loss would do the most harm."""
    run = case.oracle()
    of_site = {
        Site.SCORES: run.scores * run.probs,
        Site.PROBS: run.probs,
        Site.ROW_SUM: run.lse[..., None],
        Site.CONTEXT: run.out,
        Site.DP: run.probs * run.d_probs,
        Site.DS: run.d_scores,
        Site.DQ: run.dq,
        Site.DK: run.dk,
        Site.DV: run.dv,
    }[site][0, 0]
    if kernel == "dkdv" and site in (Site.SCORES, Site.PROBS, Site.DP, Site.DS):
        of_site = of_site.mT
    tile = of_site[ROWS, COLUMNS].abs()
    return divmod(int(tile.argmax()), tile.shape[1])


def strike(case: Case, kernel: str, site: Site, kind: str, *, num_attempts: int = 1) -> api.Strike:
    row, column = weightiest(case, kernel, site)
    what, bits = KINDS[kind]
    return api.Strike(
        kernel=kernel, site=site, block=BLOCK, tile=TILE, row=row, column=column, kind=what, bits=bits,
        num_attempts=num_attempts,
    )  # fmt: skip


def hold(records: list[FaultRecord], expected: list[CheckBit]) -> None:
    """One record a kernel that was struck, with the check that must see it, repaired at the second attempt."""
    assert len(records) == len(expected)
    for check in expected:
        (record,) = (record for record in records if check in record.checks)
        assert record.ratio > 1
        assert (record.verdict, record.num_attempts) == (Verdict.REPAIRED, 2)
        assert (record.sequence, record.layer, record.batch, record.head, record.tile) == (41, 3, 0, 0, BLOCK)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("site", IN_FORWARD, ids=lambda site: site.name.lower())
def test_a_fault_in_forward_is_seen_and_repaired_to_the_bit(
    device: torch.device, case: Case, clean: tuple[api.Forward, api.Gradients], site: Site, kind: str
) -> None:
    ring = api.Ring(device)
    order = strike(case, "forward", site, kind)
    run = case.forward(api.Checks(max_repairs=1), ring, strikes=[order], sequence=41, layer=3)
    assert torch.equal(run.out, clean[0].out)
    assert torch.equal(run.lse, clean[0].lse)
    hold(ring.drain()[0], [IN_FORWARD[site]])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("in_dq", "in_dkdv"),
    list(itertools.zip_longest(IN_DQ, IN_DKDV)),
    ids=lambda site: site.name.lower() if site else "",
)
def test_faults_in_backward_are_seen_and_repaired_to_the_bit(
    device: torch.device,
    case: Case,
    clean: tuple[api.Forward, api.Gradients],
    in_dq: Site | None,
    in_dkdv: Site | None,
    kind: str,
) -> None:
    ring = api.Ring(device)
    run, expected = clean
    orders, checks = [], []
    for kernel, site, held_by in (("dq", in_dq, IN_DQ), ("dkdv", in_dkdv, IN_DKDV)):
        if site is not None:
            orders.append(strike(case, kernel, site, kind))
            checks.append(held_by[site])
    gradients = case.backward(run, api.Checks(max_repairs=1), ring, strikes=orders, sequence=41, layer=3)
    for name in ("dq", "dk", "dv"):
        assert torch.equal(getattr(gradients, name), getattr(expected, name)), name
    hold(ring.drain()[0], checks)


@pytest.mark.parametrize(("kernel", "site"), [("dq", Site.DQ), ("dkdv", Site.DK)])
def test_a_hundredth_of_a_gradient_is_seen_where_hundreds_of_rows_were_added(
    device: torch.device, kernel: str, site: Site
) -> None:
    """Its bound by the operands' norms is far larger than the gradient."""
    launch = Launch(128, 128, 4, 1)
    tiling = Tiling(forward=launch, dq=launch, dkdv=launch, num_columns=8)
    case = Case.random(device, length_q=512, head_dim=64, seed=3, tiling=tiling)
    run, ring = case.forward(), api.Ring(device)
    accumulated = getattr(case.oracle(), site.name.lower())[0, 0] * math.sqrt(64)  # the kernel scales it last
    row, column = 5, 7
    value = accumulated[128 + row, column] + 0.01 * accumulated.square().mean().sqrt()
    order = api.Strike(
        kernel=kernel, site=site, block=1, tile=3, row=row, column=column, kind=0, bits=bits_of(float(value))
    )
    case.backward(run, api.Checks(max_repairs=1), ring, strikes=[order])
    (record,) = ring.drain()[0]
    assert record.checks == CheckBit[site.name]
    assert record.verdict == Verdict.REPAIRED


@pytest.mark.parametrize("value", [math.inf, math.nan, 3.3e38, 1e30, 1e3])
def test_an_extreme_exponential_of_the_forward_is_mended_in_place(
    device: torch.device, case: Case, clean: tuple[api.Forward, api.Gradients], value: float
) -> None:
    """Both sides of the other identities have it: all there is, is that a sum of so few cannot be so large."""
    ring = api.Ring(device)
    order = api.Strike(
        kernel="forward", site=Site.PROBS, block=BLOCK, tile=TILE, row=3, column=5, kind=0, bits=bits_of(value)
    )
    run = case.forward(api.Checks(max_repairs=1), ring, strikes=[order])
    (record,) = ring.drain()[0]
    assert record.verdict == Verdict.REPAIRED
    assert torch.equal(run.out, clean[0].out)
    assert torch.equal(run.lse, clean[0].lse)


@pytest.mark.parametrize("kind", KINDS)
def test_a_probability_that_takes_all_of_the_attention_is_held_though_its_gradient_is_none(
    device: torch.device, kind: str
) -> None:
    """Under a causal mask the first query sees one key: P = 1 and dS = 0, but dV is P·dO."""
    case, ring = Case.random(device, seed=5, causal=True), api.Ring(device)
    run = case.forward()
    what, bits = KINDS[kind]
    order = api.Strike(kernel="dkdv", site=Site.PROBS, block=0, tile=0, row=0, column=0, kind=what, bits=bits)
    gradients = case.backward(run, api.Checks(max_repairs=1), ring, strikes=[order])
    (record,) = ring.drain()[0]
    assert CheckBit.QUOTIENT in record.checks
    assert record.verdict == Verdict.REPAIRED
    expected = case.backward(run)
    assert torch.equal(gradients.dv, expected.dv)
    assert torch.equal(gradients.dk, expected.dk)


@pytest.mark.parametrize("kind", ["zero", "x1.5", "bit 22", "bit 27"])
def test_a_faulty_exponential_of_the_forward_is_seen_in_backward(device: torch.device, case: Case, kind: str) -> None:
    ring = api.Ring(device)
    faulty = case.forward(api.Checks(), ring, strikes=[strike(case, "forward", Site.PROBS, kind)])
    ring.drain()
    case.backward(faulty, api.Checks(max_repairs=1), ring)
    records, _ = ring.drain()
    assert CheckBit.MASS in records[0].checks
    assert records[0].verdict is Verdict.UNREPAIRED


@pytest.mark.parametrize("site", [Site.SCORES, Site.PROBS, Site.DS], ids=lambda site: site.name.lower())
def test_without_inner_checks_dkdv_holds_its_elements_against_extremes_only(
    device: torch.device, case: Case, clean: tuple[api.Forward, api.Gradients], site: Site
) -> None:
    for kind, seen in (("inf", True), ("nan", True), ("x1.5", False)):
        ring = api.Ring(device)
        order = strike(case, "dkdv", site, kind)
        gradients = case.backward(clean[0], api.Checks(inner=False), ring, strikes=[order])
        assert bool(ring.drain()[0]) is seen, kind
        assert torch.equal(gradients.dk, clean[1].dk) is seen, kind


def test_a_fault_that_stays_is_given_up_after_the_last_repair(device: torch.device, case: Case) -> None:
    ring = api.Ring(device)
    order = strike(case, "forward", Site.CONTEXT, "x1.5", num_attempts=99)
    run = case.forward(api.Checks(max_repairs=2), ring, strikes=[order])
    records, _ = ring.drain()
    assert [(r.verdict, r.num_attempts) for r in records] == [(Verdict.UNREPAIRED, 3)]
    assert run.status[:, 0].bool().tolist() == [False, True]


def test_a_fault_that_strikes_twice_is_repaired_at_the_third_attempt(
    device: torch.device, case: Case, clean: tuple[api.Forward, api.Gradients]
) -> None:
    ring = api.Ring(device)
    run = case.forward(
        api.Checks(max_repairs=2), ring, strikes=[strike(case, "forward", Site.SCORES, "inf", num_attempts=2)]
    )
    assert torch.equal(run.out, clean[0].out)
    assert [(r.verdict, r.num_attempts) for r in ring.drain()[0]] == [(Verdict.REPAIRED, 3)]


def test_bad_inputs_are_named_and_not_run_again(device: torch.device, case: Case) -> None:
    ring = api.Ring(device)
    bad = case.k.clone()
    bad[0, 0, 3, 2] = math.inf
    api.attention_forward(case.q, bad, case.v, checks=api.Checks(), ring=ring, tiling=case.tiling)
    records, _ = ring.drain()
    assert [(r.verdict, r.num_attempts, r.tile) for r in records] == [(Verdict.INPUTS, 1, 0), (Verdict.INPUTS, 1, 1)]


def test_a_full_ring_keeps_the_first_and_counts_the_rest(device: torch.device, case: Case) -> None:
    ring = api.Ring(device, capacity=2)
    order = strike(case, "forward", Site.CONTEXT, "nan", num_attempts=99)
    for sequence in (5, 6, 7):
        case.forward(api.Checks(max_repairs=0), ring, strikes=[order], sequence=sequence)
    records, lost = ring.drain()
    assert ([r.sequence for r in records], lost) == ([5, 6], 1)
    assert math.isinf(records[0].ratio)
    assert ring.drain() == ([], 0)


def test_a_wider_tolerance_lets_a_small_fault_pass(device: torch.device, case: Case) -> None:
    ring = api.Ring(device)
    order = strike(case, "forward", Site.CONTEXT, "x1.5")
    case.forward(api.Checks(tolerance_scale=1e6), ring, strikes=[order])
    assert ring.drain() == ([], 0)
