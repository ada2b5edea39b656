"""Products beside a mask, as MultiheadAttention computes its scores: held element by element by another product."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from resilience.abft import checksum
from resilience.abft.expectation import Expectations
from resilience.abft.gemm import Gemm
from resilience.abft.masked import worst_under_mask
from resilience.abft.sums import WeightSums
from resilience.events import DetectionKind

LOWS = {"infinite": float("-inf"), "finite": torch.finfo(torch.float32).min, "1e30": -1e30}


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def scores(low: float, batch: tuple[int, ...], *, beta: float = 1.0, alpha: float = 1.0) -> tuple[Gemm, torch.Tensor]:
    left, right = normal(*batch, 16, 8, seed=1), normal(*batch, 8, 12, seed=2)
    mask = normal(16, 12, seed=3).masked_fill(torch.ones(16, 12, dtype=torch.bool).triu(1), low)
    compute = torch.baddbmm if batch else torch.addmm
    return Gemm(left, right, mask, beta, alpha), compute(mask, left, right, beta=beta, alpha=alpha)


@pytest.mark.parametrize("low", LOWS.values(), ids=LOWS)
@pytest.mark.parametrize("batch", [(), (3,)], ids=["single", "batched"])
@pytest.mark.parametrize(("beta", "alpha"), [(1.0, 1.0), (0.5, -2.0)])
def test_what_is_masked_and_what_is_not_are_held(low: float, batch: tuple[int, ...], beta: float, alpha: float) -> None:
    gemm, out = scores(low, batch, beta=beta, alpha=alpha)
    found = Expectations(WeightSums()).alone(gemm, out)
    assert found.is_masked
    assert worst_under_mask(found, out) <= 1.0
    for row, column in ((9, 4), (2, 7)):  # seen, masked
        wrong = out.clone()
        wrong[..., row, column] = 3.0
        assert not worst_under_mask(found, wrong) <= 1.0
        confirmation = checksum.confirm(gemm, wrong, torch.zeros(out.shape[:-1]))
        assert confirmation.kind is DetectionKind.MISMATCH
    assert checksum.confirm(gemm, out, torch.zeros(out.shape[:-1])).kind is None


def test_a_fault_in_what_both_products_read_is_in_the_sums() -> None:
    """The second product is no oracle: its own sums are checked."""
    gemm, out = scores(float("-inf"), (3,))
    found = Expectations(WeightSums()).alone(gemm, out)
    gemm.left[1, 9, 3] += 0.5
    wrong = torch.baddbmm(gemm.addend, gemm.left, gemm.right)
    assert not worst_under_mask(found, wrong) <= 1.0


def test_an_addend_without_a_mask_is_none() -> None:
    gemm, out = scores(-1e4, (3,))
    assert not Expectations(WeightSums()).alone(gemm, out).is_masked


@pytest.mark.parametrize("at", [(0, 9, 4), (5, 15, 0)])
def test_a_fault_beside_a_mask_is_mended(at: tuple[int, int, int], protect: Any, striker: Any) -> None:
    """Also where the mask is finite, beside which the sums of a row are all round-off."""
    attention, x = nn.MultiheadAttention(8, 2, batch_first=True), normal(4, 16, 8, seed=1)
    mask = torch.zeros(16, 16).masked_fill(torch.ones(16, 16, dtype=torch.bool).triu(1), torch.finfo(torch.float32).min)
    expected, _ = attention(x, x, x, attn_mask=mask)
    protection = protect()
    protection.attach(attention)

    def corrupt(tensor: torch.Tensor) -> None:
        tensor[at] += 5.0

    striker.arm("attention.scores", 0, corrupt)
    protection.begin_micro_step(1, 0, 0)
    with protection.active():
        found, _ = attention(x, x, x, attn_mask=mask)
    assert [finding.mended for finding in protection.drain()] == [True]
    assert torch.equal(found, expected)


def test_a_clean_mask_settles_nothing(protect: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was 5 to 30 times the step when all of the scores were computed in float64, one matrix after the other."""
    monkeypatch.setattr(checksum, "confirm", lambda *_, **__: pytest.fail("settled"))
    attention, x = nn.MultiheadAttention(8, 2, batch_first=True), normal(4, 16, 8, seed=1).requires_grad_()
    protection = protect()
    protection.attach(attention)
    protection.begin_micro_step(1, 0, 0)
    with protection.active():
        out, _ = attention(x, x, x, attn_mask=torch.ones(16, 16, dtype=torch.bool).triu(1))
        out.sum().backward()
    assert protection.drain() == []


def test_a_product_in_place_under_autocast_leaves_nothing_in_its_cache(protect: Any) -> None:
    """Autocast keeps what it has cast; made here, that would have no gradient."""
    weight = nn.Parameter(normal(8, 8, seed=1))
    x, mask = (
        normal(4, 8, seed=2),
        torch.zeros(4, 8).masked_fill(torch.ones(4, 8, dtype=torch.bool).triu(1), -torch.inf),
    )
    protection = protect()
    protection.begin_micro_step(1, 0, 0)
    with protection.active(), torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            mask.addmm_(x, weight)
        (x @ weight).sum().backward()
    assert weight.grad is not None
    assert protection.drain() == []
    assert protection.num_failed_checks() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_that_overflows_beside_a_mask_is_no_fault(dtype: torch.dtype) -> None:
    left, right = ((2e19 * normal(2, 8, 8, seed=seed)).to(dtype) for seed in (1, 2))
    mask = torch.zeros(8, 8, dtype=dtype).masked_fill(torch.ones(8, 8, dtype=torch.bool).triu(1), -torch.inf)
    gemm, out = Gemm(left, right, mask), torch.baddbmm(mask, left, right)
    assert out.isnan().any()
    assert checksum.confirm(gemm, out, torch.zeros(2, 8)).kind is None
    small = Gemm(left * 1e-19, right * 1e-19, mask)
    assert checksum.confirm(small, out, torch.zeros(2, 8)).kind is DetectionKind.NAN
