"""What protection does to a user's modules: nothing that they or their copies would notice."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from resilience.abft.modules import own_weight


class Recurrent(nn.Module):
    """Its first products run in no module whose name says what they are; then labels look for whose weight is read."""

    def __init__(self, wrap: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        self.rnn = nn.GRU(16, 16)
        self.head = wrap(nn.Linear(16, 12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.rnn(x)[0])


class Noise(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + 0.1 * torch.randn_like(weight)


def noisy(module: nn.Module) -> nn.Module:
    return parametrize.register_parametrization(module, "weight", Noise())


def trained(wrap: Callable[[nn.Module], nn.Module], protection: Any) -> list[torch.Tensor | None]:
    """Result, gradients and random state of a step."""
    torch.manual_seed(0)
    model, x = Recurrent(wrap), torch.randn(3, 4, 16)
    if protection is None:
        with parametrize.cached():
            out = model(x)
        out.sum().backward()
    else:
        protection.attach(model)
        protection.begin_micro_step(1, 0, 0)
        with protection.active():
            with parametrize.cached():
                out = model(x)
            out.sum().backward()
        assert protection.drain() == []
        assert protection.num_failed_checks() == 0
    return [out.detach(), *(parameter.grad for parameter in model.parameters()), torch.get_rng_state()]


WRAPS = [parametrizations.spectral_norm, noisy, parametrizations.weight_norm, lambda module: module]


@pytest.mark.parametrize("wrap", WRAPS, ids=["spectral_norm", "noisy", "weight_norm", "plain"])
def test_a_computed_weight_is_not_computed_for_us(wrap: Callable[[nn.Module], nn.Module], protect: Any) -> None:
    """It would take a step of an iteration, draw random numbers, or leave parameters without a gradient."""
    expected, found = trained(wrap, None), trained(wrap, protect())
    for one, other in zip(found, expected, strict=True):
        assert one is not None
        assert other is not None
        assert torch.equal(one, other)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm`", "ignore:Initializing zero-element")
def test_a_weight_is_taken_as_it_lies_there() -> None:
    plain, normed = nn.Linear(3, 2), nn.utils.weight_norm(nn.Linear(3, 2))
    assert own_weight(plain) is plain.weight
    assert own_weight(normed) is normed.weight, "old style: an attribute"
    assert own_weight(noisy(nn.Linear(3, 2))) is None
    assert own_weight(nn.LazyLinear(2)) is None, "none yet"
    assert own_weight(nn.Linear(0, 2)) is None


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_lazy_module_is_no_defect(protect: Any) -> None:
    protection = protect()
    model = nn.ModuleDict({"rnn": nn.GRU(4, 4), "head": nn.LazyLinear(2)})
    protection.attach(model)
    protection.begin_micro_step(1, 0, 0)
    with protection.active():
        model["head"](model["rnn"](torch.ones(2, 4))[0]).sum().backward()
    assert protection.num_failed_checks() == 0


class Doubled(torch.autograd.Function):
    """One input, and a product."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x @ (2.0 * torch.eye(8))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad @ (2.0 * torch.eye(8))


@pytest.mark.parametrize("function", [Doubled.apply, torch.linalg.matrix_exp], ids=["own", "matrix_exp"])
def test_products_in_the_backward_of_a_function_of_one_input_are_checked(
    function: Callable[[torch.Tensor], torch.Tensor], protect: Any
) -> None:
    protection = protect()
    protection.begin_micro_step(1, 0, 0)
    with protection.active():
        function(torch.randn(8, 8, requires_grad=True)).sum().backward()
    assert protection.num_failed_checks() == 0
    assert protection.unprotected() == {}
    assert protection.drain() == []


def test_a_pickled_model_has_hooks_that_do_nothing_and_need_nothing(protect: Any, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.MultiheadAttention(4, 2))
    protect().attach(model)
    torch.save(model, tmp_path / "model.pt")
    read = """
import sys, torch
sys.modules["resilience"] = None  # not installed there
model = torch.load(sys.argv[1], weights_only=False)
print(model[0](torch.ones(1, 4)).shape, model[1](*[torch.ones(1, 1, 4)] * 3)[0].shape)
"""
    done = subprocess.run(
        [sys.executable, "-c", read, str(tmp_path / "model.pt")], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "[1, 4]" in done.stdout


def test_a_copy_is_not_seen(gpt: Any, protect: Any, striker: Any) -> None:
    """An average of the weights is evaluated between steps; its forward takes no labels from the model's."""
    model = gpt(layers=1)
    protection = protect()
    protection.attach(model)
    average = copy.deepcopy(model)
    striker.armed = True  # it notes what it is asked about
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    protection.begin_micro_step(1, 0, 0)
    with protection.active():
        average.attentions[0](torch.randn(1, 8, 32))
        model(tokens).backward()
    assert ("attention.q", 0) in striker.seen
    assert ("attention.q", 1) not in striker.seen, "the copy's took the number of the model's"
    assert protection.drain() == []


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_scripted_module_runs_as_it_is(protect: Any) -> None:
    protection = protect()
    model = nn.Sequential(torch.jit.script(nn.Linear(4, 4)), nn.Linear(4, 2))
    protection.attach(model)
    protection.begin_micro_step(1, 0, 0)
    with protection.active():
        model(torch.ones(3, 4)).sum().backward()
    assert protection.num_failed_checks() == 0
    protection.attach(torch.jit.script(nn.Linear(4, 4)))
