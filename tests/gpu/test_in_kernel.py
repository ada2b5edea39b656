"""Strength `kernel` from the dispatcher to the findings: attention by our kernels, repaired within them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from resilience.abft.protection import Protection
from tests.gpu.waiting import no_waiting

pytestmark = pytest.mark.gpu

SHAPE = (2, 4, 160, 64)

Protect = Callable[..., Protection]


def operands(dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(SHAPE, generator=generator).to("cuda", dtype).requires_grad_() for _ in range(3)]


def attention(leaves: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """O and the gradients of a fixed weighting of it."""
    out = F.scaled_dot_product_attention(*leaves, is_causal=True)
    weights = torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out).to(out.dtype)
    return (out.detach(), *torch.autograd.grad(out, leaves, weights))


def protected(protection: Protection, leaves: list[torch.Tensor], *, step: int = 1) -> tuple[torch.Tensor, ...]:
    protection.begin_micro_step(step, 0, 0)
    with protection.active():
        return attention(leaves)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_attention_is_ours_and_as_exact_as_the_operator_s(dtype: torch.dtype, protect: Protect) -> None:
    leaves = operands(dtype)
    exact = attention([leaf.detach().double().requires_grad_() for leaf in leaves])
    stock = attention(leaves)
    protection = protect("kernel")
    ours = protected(protection, leaves)
    assert protection.drain() == []
    assert protection._attention is not None
    assert not protection._attention.fallbacks
    assert protection.checks()["attention.context"] == protection.checks()["attention.dv"] == 1
    for mine, theirs, true in zip(ours, stock, exact, strict=True):
        error, usual = ((found.double() - true).norm() for found in (mine, theirs))
        assert error <= 2.0 * usual + 1e-6


def test_nothing_waits_for_the_device(protect: Protect) -> None:
    leaves, protection = operands(), protect("kernel")
    for step in (1, 2):
        protected(protection, leaves, step=step)
    protection.drain()
    with no_waiting():
        protected(protection, leaves, step=3)
    assert protection.drain() == []


@pytest.mark.parametrize(("kernel", "site"), [("forward", "CONTEXT"), ("dq", "DQ"), ("dkdv", "DV"), ("dkdv", "DK")])
@pytest.mark.parametrize("bits", [0x7F800000, 0x7FC00000, 0x7F000000], ids=["inf", "nan", "near-inf"])
def test_an_extreme_is_repaired_within_the_kernel_bit_for_bit(
    kernel: str, site: str, bits: int, protect: Protect
) -> None:
    from resilience.kernels.attention import api
    from resilience.kernels.attention.records import Site

    leaves = operands()
    protection = protect("kernel")
    clean = protected(protection, leaves)
    order = api.Strike(kernel=kernel, site=Site[site], block=0, tile=0, row=2, column=5, kind=0, bits=bits)
    struck = SimpleNamespace(
        supports=api.supports,
        Ring=api.Ring,
        Checks=api.Checks,
        attention_forward=functools.partial(api.attention_forward, strikes=(order,)),
        attention_backward=functools.partial(api.attention_backward, strikes=(order,)),
    )
    assert protection._attention is not None
    protection._attention._find = lambda *_: struck
    found = protected(protection, leaves, step=2)
    findings = protection.drain()
    assert findings
    assert all(finding.mended and finding.bit_exact for finding in findings)
    assert all(torch.equal(one, other) for one, other in zip(found, clean, strict=True))
