"""What the screen of gradients is spared: the gradient that its product's check has just read, and no other tensor."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from resilience.abft.last_gradient import LastGradient
from resilience.abft.protection import Protection
from resilience.config import DetectionConfig


def test_it_is_known_by_itself_and_by_its_transpose() -> None:
    last, gradient = LastGradient(), torch.ones(3, 4)
    assert last.squares_of(gradient) is None
    last.keep(gradient, 12.0)
    assert last.squares_of(gradient) == 12.0
    assert last.squares_of(gradient.mT) == 12.0
    assert last.squares_of(gradient.detach()) == 12.0


def test_nothing_else_is_taken_for_it() -> None:
    last, gradient = LastGradient(), torch.ones(4, 4)
    last.keep(gradient, 16.0)
    for other in (gradient.clone(), gradient[:2], gradient[:, :2], gradient.view(16), gradient.expand(2, 4, 4)):
        assert last.squares_of(other) is None
    assert last.squares_of(gradient.as_strided((4, 4), (4, 0))) is None


def test_a_gradient_without_plain_memory_is_not_known() -> None:
    last, gradient = LastGradient(), torch.ones(4, 4)
    last.keep(gradient, 16.0)
    assert last.squares_of(gradient.to_sparse()) is None
    assert last.squares_of(gradient.to("meta")) is None


def test_a_gradient_that_was_written_to_is_not_known_any_more() -> None:
    last, gradient = LastGradient(), torch.ones(4, 4)
    last.keep(gradient, 16.0)
    gradient.mT[0, 0] = 5.0
    assert last.squares_of(gradient) is None


def test_memory_that_serves_again_is_not_known() -> None:
    last, gradient = LastGradient(), torch.ones(4, 4)
    last.keep(gradient, 16.0)
    seen = weakref.ref(gradient)
    del gradient
    assert seen() is None  # nobody holds it
    assert last.squares_of(torch.ones(4, 4)) is None


@pytest.mark.parametrize("squares", [float("inf"), float("nan")])
def test_squares_beyond_the_range_are_not_known(squares: float) -> None:
    last, gradient = LastGradient(), torch.ones(4, 4)
    last.keep(gradient, squares)
    assert last.squares_of(gradient) is None


# --- in a backward pass -----------------------------------------------------------------------------------------------


class Conv1D(nn.Module):
    """As GPT-2's: its weight is (inputs, outputs)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)


@pytest.fixture
def protection() -> Iterator[Protection]:
    protected = Protection(DetectionConfig(strength="checksum"))
    protected.install()
    yield protected
    protected.uninstall()


def known_in_hooks(protection: Protection, model: nn.Module, *, num_passes: int = 1) -> dict[str, list[float | None]]:
    """What is known of each parameter's gradient in its hook, held against the gradient."""
    found: dict[str, list[float | None]] = {name: [] for name, _ in model.named_parameters()}

    def watch(name: str, parameter: nn.Parameter) -> None:
        def read(gradient: torch.Tensor) -> None:
            squares = protection.squares_of(gradient)
            found[name].append(squares)
            if squares is not None:
                assert squares == pytest.approx(float(gradient.double().square().sum()), rel=1e-5)

        parameter.register_hook(read)  # type: ignore[no-untyped-call]

    for name, parameter in model.named_parameters():
        watch(name, parameter)
    protection.attach(model)
    for number in range(num_passes):
        protection.begin_micro_step(0, number, 0)
        with protection.active():
            model(torch.randn(4, 6, 20)).square().sum().backward()
    return found


@pytest.mark.parametrize("bias", [True, False])
def test_gradients_of_weights_are_known_in_every_pass(protection: Protection, bias: bool) -> None:
    model = nn.Sequential(nn.Linear(20, 30, bias=bias), nn.GELU(), nn.Linear(30, 20, bias=bias), Conv1D(20, 9))
    found = known_in_hooks(protection, model, num_passes=3)
    for name in ("0.weight", "2.weight", "3.weight"):
        assert all(squares is not None for squares in found[name]), name
    assert found["3.bias"] == [None] * 3


def test_a_gradient_summed_from_two_products_is_not_known(protection: Protection) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.both = nn.Linear(20, 20)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.both(self.both(x))
            return out

    assert known_in_hooks(protection, Twice())["both.weight"] == [None]


def test_a_sparse_gradient_after_a_product_is_not_known(protection: Protection) -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.out = nn.Embedding(9, 20, sparse=True), nn.Linear(20, 9)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.out(self.words(x[..., 0].abs().long()))
            return out

    found = known_in_hooks(protection, Words())
    assert found["words.weight"] == [None]
    assert found["out.weight"] != [None]


def test_a_gradient_that_a_script_has_changed_is_not_known(protection: Protection) -> None:
    model = nn.Linear(20, 30)
    model.weight.register_hook(lambda gradient: gradient * 2.0)  # type: ignore[no-untyped-call]
    assert known_in_hooks(protection, model)["weight"] == [None]


def test_gradients_are_not_copied_for_it(protection: Protection) -> None:
    """Autograd makes a copy of a gradient that somebody else holds, too."""
    model, places = nn.Linear(20, 30, bias=False), []
    model.weight.register_hook(lambda gradient: places.append(gradient.data_ptr()))  # type: ignore[no-untyped-call]
    protection.attach(model)
    protection.begin_micro_step(0, 0, 0)
    with protection.active():
        model(torch.randn(4, 6, 20)).square().sum().backward()
    gc.collect()
    assert model.weight.grad is not None
    assert [model.weight.grad.data_ptr()] == places
