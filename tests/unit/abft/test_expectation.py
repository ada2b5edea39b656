"""Sums that are carried from a product to its gradients: the same as from the operands, with each tensor read once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from resilience.abft import checksum, expectation, sums
from resilience.abft.expectation import Expectation, Expectations
from resilience.abft.gemm import Gemm
from resilience.abft.sums import WeightSums

SHAPES = [(12, 7, 20), (12, 12, 20), (9, 9, 9), (20, 7, 7), (8, 20, 8)]


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gradients(left: torch.Tensor, right: torch.Tensor, d_out: torch.Tensor) -> dict[str, Gemm]:
    """The two gradients of left·right, each straight and transposed, as libraries compute them."""
    return {
        "left": Gemm(d_out, right.mT),
        "left transposed": Gemm(right, d_out.mT),
        "right": Gemm(left.mT, d_out),
        "right transposed": Gemm(d_out.mT, left),
    }


def ratio(found: Expectation, out: torch.Tensor) -> float:
    residual = (found.sums - found.observed(out)).abs().max()
    return float(residual / found.sums.abs().max())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("batch", [(), (3,)], ids=["single", "batched"])
@pytest.mark.parametrize(
    "forms", [("left", "right"), ("right transposed", "left transposed"), ("left", "right transposed")]
)
def test_carried_sums_are_those_of_the_gradients(
    shape: tuple[int, int, int], batch: tuple[int, ...], forms: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    m, k, n = shape
    left, right, d_out = normal(*batch, m, k, seed=1), normal(*batch, k, n, seed=2), normal(*batch, m, n, seed=3)
    expectations = Expectations(WeightSums())
    expectations.forward(Gemm(left, right), left @ right, node=5)
    monkeypatch.setattr(expectations, "alone", lambda *_: pytest.fail("nothing was carried"))
    for form in forms:
        gemm = gradients(left, right, d_out)[form]
        out = gemm.left @ gemm.right
        found = expectations.backward(gemm, out, node=5)
        assert ratio(found, out) < 1e-5
        torch.testing.assert_close(found.gemm.left @ found.gemm.right, found.oriented(out))
        out.view(-1)[out.numel() // 2] += 10.0
        assert ratio(found, out) > 1e-2


def test_each_gradient_is_checked_alone_where_nothing_fits() -> None:
    left, right, d_out = normal(8, 8, seed=1), normal(8, 8, seed=2), normal(8, 8, seed=3)
    moved = gradients(left.clone(), right.clone(), d_out)
    for node in (5, 6):
        expectations = Expectations(WeightSums())
        expectations.forward(Gemm(left, right), left @ right, node=5)
        for gemm in (moved if node == 5 else gradients(left, right, d_out)).values():
            out = gemm.left @ gemm.right
            assert ratio(expectations.backward(gemm, out, node=node), out) < 1e-5


def test_a_parameter_is_known_wherever_it_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    """ZeRO-3 frees a weight after forward, and gathers it into other memory for backward."""
    left, weight, d_out = normal(8, 6, seed=1), nn.Parameter(normal(10, 6, seed=2)), normal(8, 10, seed=3)
    expectations = Expectations(WeightSums())
    expectations.forward(Gemm(left, weight.t()), left @ weight.detach().t(), node=5)
    kept, weight.data = weight.data, weight.data.clone()
    monkeypatch.setattr(expectations, "alone", lambda *_: pytest.fail("nothing was carried"))
    out = d_out @ weight.detach()
    assert ratio(expectations.backward(Gemm(d_out, weight), out, node=5), out) < 1e-5
    assert kept.data_ptr() != weight.data_ptr()


def test_memory_that_is_anothers_now_is_no_operand() -> None:
    left, right, d_out = normal(8, 6, seed=1), normal(6, 10, seed=2), normal(8, 10, seed=3)
    expectations = Expectations(WeightSums())
    expectations.forward(Gemm(left, right), left @ right, node=5)
    # Another storage at the same address, as an allocator gives it.
    other = torch.from_dlpack(left.numpy())
    assert other.data_ptr() == left.data_ptr()
    left.mul_(3.0)
    out = other.mT @ d_out
    assert ratio(expectations.backward(Gemm(other.mT, d_out), out, node=5), out) < 1e-5


def test_memory_is_known_as_long_as_sums_of_it_are_kept() -> None:
    """Its number stays taken, though what was in it is gone."""
    left, right = normal(8, 6, seed=1), normal(6, 10, seed=2)
    expectations = Expectations(WeightSums())
    expectations.forward(Gemm(left, right), left @ right, node=5)
    carried = expectations._carried[5]
    assert carried is not None
    assert not any(memory.expired() for memory in carried.memory)
    del left
    assert [memory.expired() for memory in carried.memory] == [True, False]
    others = [torch.empty(8, 6) for _ in range(1000)]
    assert carried.left.storage not in {other.untyped_storage()._cdata for other in others}


def test_a_square_operand_the_other_way_round_is_another_matrix() -> None:
    left, right, d_out = normal(8, 8, seed=1), normal(8, 8, seed=2), normal(8, 8, seed=3)
    for gemm in (Gemm(d_out, right), Gemm(right.mT, d_out), Gemm(left, d_out), Gemm(d_out, left.mT)):
        expectations = Expectations(WeightSums())
        expectations.forward(Gemm(left, right), left @ right, node=5)
        out = gemm.left @ gemm.right
        assert ratio(expectations.backward(gemm, out, node=5), out) < 1e-5


def test_another_product_takes_the_place_of_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs forward within a backward pass may be no recomputation of what it is taken for."""
    left, weight, d_out = normal(8, 6, seed=1), nn.Parameter(normal(6, 10, seed=2)), normal(8, 10, seed=3)
    expectations = Expectations(WeightSums())
    expectations.forward(Gemm(left, weight), left @ weight.detach(), node=5)
    other = nn.Parameter(normal(6, 10, seed=4))
    expectations.forward(Gemm(left, other), left @ other.detach(), node=6, recomputed=5)
    monkeypatch.setattr(expectations, "alone", lambda *_: pytest.fail("nothing was carried"))
    out = d_out @ weight.detach().mT
    assert ratio(expectations.backward(Gemm(d_out, weight.mT), out, node=5), out) < 1e-5


def test_a_node_of_many_products_carries_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    left, right, d_out = normal(8, 6, seed=1), normal(6, 10, seed=2), normal(8, 10, seed=3)
    expectations = Expectations(WeightSums())
    for _ in range(3):
        expectations.forward(Gemm(left, right), left @ right, node=5)
    alone: list[Gemm] = []
    inner = expectations.alone

    def noting(gemm: Gemm, out: torch.Tensor) -> Expectation:
        alone.append(gemm)
        return inner(gemm, out)

    monkeypatch.setattr(expectations, "alone", noting)
    gemm = gradients(left, right, d_out)["left"]
    expectations.backward(gemm, gemm.left @ gemm.right, node=5)
    assert alone == [gemm]


def test_graphs_that_never_run_backward_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expectation, "_MAX_CARRIED", 10)
    expectations = Expectations(WeightSums())
    left, right = normal(4, 3, seed=1), normal(3, 5, seed=2)
    for node in range(50):
        expectations.forward(Gemm(left, right), left @ right, node=node)
    assert sorted(expectations._carried) == list(range(40, 50))


def test_sums_of_a_frozen_weight_go_with_its_only_gradient(protect: Any) -> None:
    """Adapters are trained beside frozen weights: what waited for gradients that nobody asks for would pile up."""
    frozen, trained = nn.Linear(24, 40).requires_grad_(False), nn.Linear(40, 8)
    model = nn.Sequential(nn.Linear(16, 24), frozen, trained)
    protection = protect()
    protection.attach(model)
    protection.begin_micro_step(1, 0, 0)
    with protection.active():
        model(normal(4, 16, seed=1)).sum().backward()
    carried = protection._gemms._expectations._carried
    assert not any(kept.right.parameter() is frozen.weight for kept in carried.values() if kept is not None)
    assert protection.drain() == []


def test_parameters_can_be_swapped_after_a_step(protect: Any) -> None:
    """torch does not swap a tensor that anybody has a weak reference to."""
    model = nn.Sequential(nn.Linear(8, 8))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    protection = protect()
    protection.attach(model)
    protection.begin_micro_step(1, 0, 0)
    with protection.active():
        model(normal(2, 8, seed=1)).sum().backward()
    assert protection.drain() == []
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.load_state_dict(state)
        model.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert model[0].weight.dtype == torch.float64


@pytest.mark.parametrize("form", ["left", "left transposed"])
def test_the_gradient_beside_a_frozen_weight_is_held(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    left, d_out = normal(6, 7, seed=1), normal(6, 9, seed=3)
    weight = nn.Parameter(normal(9, 7, seed=2), requires_grad=False)
    expectations = Expectations(WeightSums())
    expectations.forward(Gemm(left, weight.t()), left @ weight.t(), node=5)
    monkeypatch.setattr(expectations, "alone", lambda *_: pytest.fail("nothing was carried"))
    gemm = gradients(left, weight.t(), d_out)[form]
    out = gemm.left @ gemm.right
    found = expectations.backward(gemm, out, node=5)
    assert ratio(found, out) < 1e-5
    out[0, 0] += 10.0
    assert ratio(found, out) > 1e-2
    assert expectations._carried == {}


def linear(bias: bool) -> Callable[[], nn.Module]:
    return lambda: nn.Linear(24, 40, bias=bias)


@pytest.mark.parametrize("recomputed", [None, "reentrant", "non_reentrant"])
@pytest.mark.parametrize("make", [linear(True), linear(False)], ids=["addmm", "mm"])
def test_a_training_step_reads_each_tensor_once(
    make: Callable[[], nn.Module], recomputed: str | None, protect: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []

    def counting(inner: Callable[..., Any]) -> Callable[..., Any]:
        def counted(matrix: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            read.append(matrix.numel())
            return inner(matrix, *args, **kwargs)

        return counted

    for module_of, name in ((sums, "sums_of"), (expectation, "sums_of"), (checksum, "worst_ratio_of")):
        monkeypatch.setattr(module_of, name, counting(getattr(module_of, name)))
    module, x = make(), normal(64, 24, seed=1).requires_grad_()
    protection = protect()
    protection.attach(module)
    protection.begin_micro_step(1, 0, 0)

    def block(x: torch.Tensor) -> torch.Tensor:
        return module(x * 1.0)  # a recomputation makes this anew, elsewhere

    with protection.active():
        out = checkpoint(block, x, use_reentrant=recomputed == "reentrant") if recomputed else block(x)
        out.backward(normal(64, 40, seed=2))
    weight, inputs, outputs, bias = 24 * 40, 64 * 24, 64 * 40, 40 if module.bias is not None else 0
    again = inputs + outputs if recomputed else 0
    assert sum(read) == (weight + inputs + outputs + bias) + again + (outputs + inputs + weight)
    assert protection.drain() == []


class Mixer(nn.Module):
    """Attention whose products have no names of their own, in blocks that are recomputed."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleList(nn.Linear(16, 48) for _ in range(4))
        self.up = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for inner in self.inner:
            x = checkpoint(self.block, x, inner, use_reentrant=False)
        return x.square().mean()

    def block(self, x: torch.Tensor, inner: nn.Module) -> torch.Tensor:
        q, k, v = inner(x).chunk(3, -1)
        for _ in range(2):
            x = x + F.gelu(self.up(x))
        return x + (q @ k.mT / 4.0).softmax(-1) @ v


@pytest.mark.parametrize("order", ["one", "retained", "two losses", "pipeline"])
@pytest.mark.parametrize("name", ["mixer", "gpt", "gpt sdpa"])
def test_no_sums_but_an_operands_own_are_used(name: str, order: str, gpt: Any, protect: Any) -> None:
    """What a recomputation makes is freed, and its address given to another tensor: the sums of either would raise an
    alarm, which nothing dismisses on a GPU.
    """
    torch.manual_seed(1)
    if name == "mixer":
        model, batches = Mixer(), [normal(2, 16, 16, seed=seed) for seed in (1, 2)]
    else:
        model = gpt(layers=2, checkpointing="non_reentrant", sdpa=name == "gpt sdpa")
        batches = [(normal(2, 16, seed=seed).abs() * 10).long() for seed in (1, 2)]
    protection, ratios = protect(), []
    protection.attach(model)
    protection.tell_ratios(lambda site, ratio, alarm: ratios.append(ratio))
    for step in range(8):  # memory is given anew in another order each time
        protection.begin_micro_step(step, 0, 0)
        with protection.active():
            loss = model(batches[0])
            if order == "retained":
                loss.backward(retain_graph=True)
            if order == "pipeline":
                protection.begin_micro_step(step, 1, 0)
            other = model(batches[1]) if order in ("two losses", "pipeline") else None
            loss.backward()
            if other is not None:
                other.backward()
    assert max(ratios) <= 1.0
    assert protection.drain() == []


class Functional(nn.Module):
    """Products with square weights that no module names."""

    def __init__(self, block: str) -> None:
        super().__init__()
        self.weights = nn.ParameterList(normal(32, 32, seed=seed) / 32**0.5 for seed in range(4))
        self.block = getattr(self, block)

    def forward(self, x: torch.Tensor, use_reentrant: bool = False) -> torch.Tensor:
        for one, other in (self.weights[:2], self.weights[2:]):
            x = checkpoint(self.block, x, one, other, use_reentrant=use_reentrant)
        return x.square().mean()

    def two(self, x: torch.Tensor, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return torch.tanh(torch.tanh(x * 1.0 @ one) @ other)

    def tied(self, x: torch.Tensor, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(x @ one) @ one.t() + x @ other


@pytest.mark.parametrize("block", ["two", "tied"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_products_without_a_module_find_their_own_sums(
    block: str, use_reentrant: bool, protect: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, protection, ratios = Functional(block), protect(), []
    protection.attach(model)
    protection.tell_ratios(lambda site, ratio, alarm: ratios.append(ratio))
    alone = Expectations.alone

    def forward_only(self: Expectations, gemm: Gemm, out: torch.Tensor) -> Expectation:
        assert torch._C._current_graph_task_id() == -1, "nothing was carried"
        return alone(self, gemm, out)

    monkeypatch.setattr(Expectations, "alone", forward_only)
    for step in range(2):
        protection.begin_micro_step(step, 0, 0)
        with protection.active():
            model(normal(64, 32, seed=9).requires_grad_(), use_reentrant).backward()
    assert max(ratios) <= 1.0
    assert protection.unprotected() == {}


@pytest.mark.parametrize("is_penalty", [False, True])
def test_a_gradient_that_is_kept_as_a_graph_is_no_recomputation(is_penalty: bool, protect: Any) -> None:
    """dX = dC·Wᵀ of a square W, computed with a graph of its own, runs forward within a backward pass."""
    one, other = (nn.Parameter(normal(32, 32, seed=seed) / 32**0.5) for seed in (1, 2))
    protection, ratios = protect(), []
    protection.tell_ratios(lambda site, ratio, alarm: ratios.append(ratio))
    for step in range(2):
        protection.begin_micro_step(step, 0, 0)
        x = normal(64, 32, seed=3).requires_grad_()
        with protection.active():
            out = torch.tanh(x @ one) @ other
            loss = out.sum() if is_penalty else torch.tanh(out).square().sum()
            (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
            (loss + gradient.square().sum() if is_penalty else loss).backward()
    assert max(ratios) <= 1.0
    assert protection.drain() == []


@pytest.mark.parametrize("low", [float("-inf"), torch.finfo(torch.float32).min], ids=["infinite", "finite"])
def test_a_mask_in_an_addend_is_no_alarm_where_nothing_can_confirm(low: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU; MultiheadAttention adds its mask by baddbmm. Rows without a masked element are checked."""
    monkeypatch.setattr(expectation, "_is_settled_at_once", lambda out: False)
    left, right = normal(3, 16, 8, seed=1), normal(3, 8, 16, seed=2)
    mask = torch.zeros(3, 16, 16).masked_fill(torch.ones(16, 16, dtype=torch.bool).triu(1), low)
    gemm, out = Gemm(left, right, mask), torch.baddbmm(mask, left, right)

    def ratio(out: torch.Tensor) -> list[float]:
        found = Expectations(WeightSums()).alone(gemm, out)
        return checksum.deferred_residual(gemm, found.sums, found.observed(out), out.dtype).tolist()

    worst, bad = ratio(out)
    assert worst <= 1.0
    assert not bad
    out[2, 15, 4] += 1.0
    assert ratio(out)[0] > 1.0
    mask[0, 15, 2] = float("nan")
    worst, bad = ratio(torch.baddbmm(mask, left, right))
    assert not worst <= 1.0
    assert bad
