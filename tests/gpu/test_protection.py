"""Checks around a small model on the device: nothing changes, nothing waits, faults are found at the boundary."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from resilience.abft.protection import Protection
from tests.gpu.waiting import no_waiting

pytestmark = pytest.mark.gpu

WIDTH, HEADS, LENGTH = 64, 4, 96


class Attention(nn.Module):
    """Causal, eager or fused, over (batch, length, width)."""

    def __init__(self, *, fused: bool) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.fused = fused
        self.register_buffer("future", torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            part(x).view(*x.shape[:2], HEADS, -1).transpose(1, 2) for part in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            scores = q @ k.transpose(-2, -1) * (WIDTH // HEADS) ** -0.5
            y = scores.masked_fill(self.future, float("-inf")).softmax(-1) @ v
        return self.out_proj(y.transpose(1, 2).reshape(x.shape))


class Model(nn.Module):
    """Two blocks of attention and MLP."""

    def __init__(self, *, fused: bool) -> None:
        super().__init__()
        self.attention = nn.ModuleList(Attention(fused=fused) for _ in range(2))
        self.mlp = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)) for _ in range(2)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for attention, mlp in zip(self.attention, self.mlp, strict=True):
            x = x + attention(x)
            x = x + mlp(F.layer_norm(x, (WIDTH,)))
        return x.float().square().mean()


class Striker:
    """Strikes one address once, without waiting for the device."""

    armed = True

    def __init__(self) -> None:
        self.address: tuple[str, int] | None = None
        self.corrupt: Callable[[torch.Tensor], None] = lambda tensor: None

    def strike(self, site: str, layer: int, tensor: torch.Tensor, call: int = 0) -> bool:
        if (site, layer) != self.address:
            return False
        self.address = None
        self.corrupt(tensor)
        return True


def infinite(tensor: torch.Tensor) -> None:
    tensor.view(-1)[tensor.numel() // 3] = float("inf")


def shifted(tensor: torch.Tensor) -> None:
    """One element off by twenty times the largest, above bfloat16's round-off."""
    tensor.view(-1)[tensor.numel() // 3] += 20.0 * tensor.abs().max() + 1e-3


@pytest.fixture
def striker() -> Striker:
    return Striker()


@pytest.fixture(params=["invariants", "checksum"])
def strength(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def protect(protect: Callable[..., Protection], striker: Striker) -> Callable[[str], Protection]:
    """With the striker in it."""
    return lambda strength: protect(strength, striker)


def model_and_input(dtype: torch.dtype, *, fused: bool) -> tuple[Model, torch.Tensor]:
    torch.manual_seed(0)
    model = Model(fused=fused).to("cuda", dtype)
    return model, torch.randn(2, LENGTH, WIDTH, device="cuda").to(dtype)


def step(model: Model, x: torch.Tensor) -> list[torch.Tensor]:
    """Loss and gradients."""
    model.zero_grad()
    loss = model(x)
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def protected(protection: Protection, model: Model, x: torch.Tensor, *, number: int = 1) -> list[torch.Tensor]:
    protection.begin_micro_step(number, 0, 0)
    with protection.active():
        return step(model, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("fused", [False, True])
def test_without_a_fault_nothing_differs_and_nothing_is_found(
    dtype: torch.dtype, fused: bool, strength: str, protect: Callable[[str], Protection]
) -> None:
    model, x = model_and_input(dtype, fused=fused)
    expected = step(model, x)
    protection = protect(strength)
    protection.attach(model)
    found = protected(protection, model, x)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert protection.drain() == []
    assert (sum(protection.checks().values()) > 0) == (fused or strength == "checksum")


@pytest.mark.parametrize("fused", [False, True])
def test_no_operation_of_a_protected_step_waits_for_the_device(
    fused: bool, strength: str, protect: Callable[[str], Protection]
) -> None:
    model, x = model_and_input(torch.bfloat16, fused=fused)
    protection = protect(strength)
    protection.attach(model)
    for number in (1, 2):  # kernels are compiled, vectors of weights are made
        protected(protection, model, x, number=number)
    protection.drain()
    with no_waiting():
        protected(protection, model, x, number=3)
    assert protection.drain() == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("corrupt", [infinite, shifted])
@pytest.mark.parametrize(
    ("site", "layer"),
    [
        ("attention.q", 1),
        ("attention.scores", 0),
        ("attention.context", 1),
        ("attention.dv", 0),
        ("linear.out", 1),
        ("linear.dgrad", 8),
        ("linear.wgrad", 0),
    ],
)
def test_a_fault_is_found_at_the_boundary_and_named(
    dtype: torch.dtype,
    corrupt: Callable[[torch.Tensor], None],
    site: str,
    layer: int,
    striker: Striker,
    protect: Callable[[str], Protection],
) -> None:
    model, x = model_and_input(dtype, fused=False)
    protection = protect("checksum")
    protection.attach(model)
    striker.address, striker.corrupt = (site, layer), corrupt
    protected(protection, model, x)
    assert striker.address is None, "it has struck"
    first, *_ = protection.drain()
    assert (first.site, first.layer) == (site, layer)
    assert not first.mended
    assert not first.inputs_bad
    assert first.residual_ratio > 1.0


@pytest.mark.parametrize("site", ["attention.q", "attention.probs", "linear.wgrad"])
def test_a_fault_that_comes_again_is_mended_in_the_replay(
    site: str, striker: Striker, protect: Callable[[str], Protection]
) -> None:
    model, x = model_and_input(torch.bfloat16, fused=False)
    protection = protect("checksum")
    protection.attach(model)
    clean = protected(protection, model, x)
    striker.corrupt = infinite
    for attempt, is_mended in ((0, False), (1, True)):
        striker.address = (site, 0)
        protection.begin_micro_step(2, 0, attempt)
        with protection.active():
            found = step(model, x)
        first, *_ = protection.drain()
        assert (first.site, first.mended) == (site, is_mended)
    assert all(torch.equal(one, other) for one, other in zip(found, clean, strict=True))
