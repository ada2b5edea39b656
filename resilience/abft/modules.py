"""What is taken from a user's modules, and put on them, without running their code or going where they go."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.parameter import is_lazy

__all__ = ["Hook", "own_weight"]


class Hook:
    """A hook that stays behind: where its module is copied or pickled, one that does nothing goes along, which is read
    without this package.
    """

    def __init__(self, call: Callable[..., None]) -> None:
        self._call = call

    def __call__(self, *args: Any) -> None:
        self._call(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (contextlib.nullcontext(), "__exit__")


def own_weight(module: torch.nn.Module) -> torch.Tensor | None:
    """The weight that lies in a linear module; None where it has none, or none yet.

    Never by the attribute. Of a parametrized module that is a property which computes: it takes a step of spectral
    norm's iteration, draws random numbers, or keeps a weight for the forward that autograd does not know. Under ZeRO-3
    it gathers.
    """
    weight = module._parameters.get("weight")
    if weight is None:
        weight = vars(module).get("weight")  # old style weight norm
    return weight if isinstance(weight, torch.Tensor) and not is_lazy(weight) and weight.numel() > 0 else None
