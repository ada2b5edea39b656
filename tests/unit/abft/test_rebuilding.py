"""Mends from checksums inside a protected model: on demand, and of calls that cannot be made again."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from resilience.abft.carried import _median
from resilience.abft.finding import Finding
from resilience.abft.gemm import parse_gemm
from resilience.abft.mend import rebuilt
from resilience.abft.protection import Protection
from resilience.events import DetectionKind

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
OVERWRITING = {
    "mm(a, b, out=a)": lambda a, b: torch.mm(a, b, out=a),
    "a.addmm_(b, a)": lambda a, b: a.addmm_(b, a),
    "rows that meet": lambda a, b: torch.mm(a[10:20, :10], b[:10, :10], out=a[5:15, :10]),
}


class Calling(nn.Module):
    """Runs one call."""

    def __init__(self, call: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.call = call

    def forward(self, *operands: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return self.call(*operands)


def run(
    protect: Any, call: Callable[..., torch.Tensor], *operands: torch.Tensor
) -> tuple[torch.Tensor, list[Finding], Protection]:
    protection = protect()
    protection.attach(Calling(call))
    protection.begin_micro_step(1, 0, 0)
    with protection.active():
        out = Calling(call)(*operands)
    return out, protection.drain(), protection


def squares(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    first, second = (torch.randn(40, 40, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    return first, second


@pytest.mark.parametrize("name", OVERWRITING)
def test_a_product_written_over_its_operand_is_undefined_so_it_is_counted_and_not_checked(
    name: str, protect: Any
) -> None:
    a, b = squares(torch.float64)
    plain = OVERWRITING[name](a.clone(), b)
    out, found, protection = run(protect, OVERWRITING[name], a.clone(), b)
    assert torch.equal(out, plain)
    assert found == []
    assert protection.checks() == {}
    assert protection.unprotected() == {"product written over its own operand": 1}


def test_parts_of_one_buffer_do_not_overlap_and_the_call_is_made_again(protect: Any, striker: Any) -> None:
    buffer = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(1))
    clean = buffer[0] @ buffer[1]
    striker.arm("matmul", 0, lambda tensor: tensor[3, 4].fill_(math.inf))
    out, found, _ = run(protect, lambda a, b, out: torch.mm(a, b, out=out), *buffer)
    assert torch.equal(out, clean)
    assert [(each.mended, each.bit_exact) for each in found] == [(True, True)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_call_that_cannot_be_made_again_is_rebuilt(dtype: torch.dtype, protect: Any, striker: Any) -> None:
    """Its addend is one row of what it writes."""
    a, b = squares(dtype)

    def call(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        return torch.addmm(out[3], a, b, out=out)

    clean = call(a, b, a.clone())
    out, found, _ = run(protect, call, a, b, a.clone())
    assert torch.equal(out, clean)
    assert found == []
    striker.arm("matmul", 0, lambda tensor: tensor[3, 4].fill_(math.inf))
    out, found, _ = run(protect, call, a, b, a.clone())
    assert [(each.kind, each.mended, each.bit_exact) for each in found] == [(DetectionKind.INF, True, False)]
    torch.testing.assert_close(out, clean, rtol=0, atol=40 * float(torch.finfo(dtype).eps) * float(clean.abs().max()))


def test_what_can_neither_be_repeated_nor_rebuilt_is_left_to_a_replay(protect: Any, striker: Any) -> None:
    a, b = squares(torch.float32)
    striker.arm("matmul", 0, lambda tensor: tensor[3:6, 3:6].fill_(99.0))
    out, found, _ = run(protect, lambda a, b, out: torch.addmm(out[3], a, b, out=out), a, b, a.clone())
    assert [(each.kind, each.mended) for each in found] == [(DetectionKind.MISMATCH, False)]
    assert bool((out[3:6, 3:6] == 99.0).all())


@pytest.mark.parametrize("site", ["attention.scores", "linear.out", "linear.dgrad", "linear.wgrad", "attention.dv"])
def test_rebuilding_on_demand_mends_forward_and_backward_within_round_off(
    site: str, gpt: Any, protect: Any, striker: Any
) -> None:
    tokens = torch.randint(50, (2, 12), generator=torch.Generator().manual_seed(0))

    def gradients(protection: Any) -> list[torch.Tensor]:
        torch.manual_seed(1)
        model = gpt(layers=1)
        protection.attach(model)
        protection.begin_micro_step(1, 0, 0)
        torch.manual_seed(2)
        with protection.active():
            model(tokens).backward()
        return [parameter.grad for parameter in model.parameters()]

    clean = gradients(protect())
    striker.arm(site, 0, lambda tensor: tensor.view(-1)[5].fill_(math.nan))
    protection = protect(mend="rebuild")
    mended = gradients(protection)
    assert [(each.site, each.mended, each.bit_exact) for each in protection.drain()] == [(site, True, False)]
    for one, other in zip(mended, clean, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_where_rebuilding_gives_up_the_same_call_is_made_again(gpt: Any, protect: Any, striker: Any) -> None:
    model = gpt(layers=1)
    protection = protect(mend="rebuild")
    protection.attach(model)
    striker.arm("linear.out", 0, lambda tensor: tensor.fill_(3.0))
    protection.begin_micro_step(1, 0, 0)
    with protection.active():
        model(torch.randint(50, (2, 12), generator=torch.Generator().manual_seed(0)))
    assert [(each.site, each.mended, each.bit_exact) for each in protection.drain()] == [("linear.out", True, True)]


def test_nothing_wrong_is_nothing_rebuilt() -> None:
    a, b = squares(torch.float32)
    gemm = parse_gemm("mm", (a, b), {})
    assert gemm is not None
    assert not rebuilt(gemm, a @ b)


def test_the_usual_energy_is_the_median_of_what_is_finite() -> None:
    generator = torch.Generator().manual_seed(0)
    for length in (1, 2, 3, 8, 9):
        energy = torch.rand(4, 3, length, generator=generator)
        energy[torch.rand(4, 3, length, generator=generator) > 0.7] = torch.inf
        energy[0, 0] = torch.nan
        expected = torch.where(energy.isfinite(), energy, torch.nan).nanmedian(-1, keepdim=True).values.nan_to_num(0.0)
        assert torch.equal(_median(energy), expected)
        assert _median(energy)[0, 0] == 0.0
