"""What goes into and comes out of a model: how inputs are kept for a second run, and how outputs are tapped.

Inputs are kept by reference where that is safe and by copy where it is cheap; a reference carries the tensor's version
counter, so that a change in place is noticed. Outputs are replaced by their own identity, so that what the *script*
sends back is told apart from what flows inside the model (a Hugging Face loss is computed from the logits beside it).
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

__all__ = ["KeptTensor", "Unrecordable", "differentiable", "keep", "take", "tap", "unchanged"]

_COPY_BYTES_MAX = 1 << 20
"""Tensors up to this size are copied at once: token ids and scalars, for less than a reference would cost to check."""

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size, enum.Enum)


class Unrecordable(Exception):
    """A value that cannot be kept for a second run; the message says why."""


@dataclasses.dataclass(frozen=True, slots=True)
class KeptTensor:
    """An input tensor: a copy, or the tensor itself with the version that it had."""

    tensor: torch.Tensor
    version: int | None
    """None for a copy."""

    def is_unchanged(self) -> bool:
        """Whether the tensor still holds what it held when it was kept."""
        return self.version is None or self.tensor._version == self.version


def keep(value: Any, *, copy: bool = False) -> Any:
    """`value` with each tensor in it kept and its containers rebuilt; `take` gives it back.

    Args:
        value: positional or keyword arguments of a forward: tensors, numbers, text, numpy arrays, nested in tuples,
            lists and dicts.
        copy: copy every tensor, large ones too.

    Raises:
        Unrecordable: a tensor carries a graph of its own, or a value has a type that may change unseen.
    """
    if isinstance(value, torch.Tensor):
        return _keep_tensor(value, copy)
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, np.ndarray):
        return value.copy()
    if isinstance(value, (tuple, list)):
        return _rebuild(value, [keep(item, copy=copy) for item in value])
    if isinstance(value, dict):
        return {key: keep(item, copy=copy) for key, item in value.items()}
    raise Unrecordable(f"an input of type {type(value).__name__} may change unseen")


def take(kept: Any) -> Any:
    """The value that `keep` kept, ready for a forward."""
    if isinstance(kept, KeptTensor):
        # A copy stays clean for the next attempt, which a forward that writes into its input would spoil.
        return kept.tensor.clone() if kept.version is None else kept.tensor
    if isinstance(kept, np.ndarray):
        return kept.copy()
    if isinstance(kept, (tuple, list)):
        return _rebuild(kept, [take(item) for item in kept])
    if isinstance(kept, dict):
        return {key: take(item) for key, item in kept.items()}
    return kept


def unchanged(kept: Any) -> bool:
    """Whether every tensor that is kept by reference still holds what it held."""
    if isinstance(kept, KeptTensor):
        return kept.is_unchanged()
    if isinstance(kept, (tuple, list)):
        return all(unchanged(item) for item in kept)
    if isinstance(kept, dict):
        return all(unchanged(item) for item in kept.values())
    return True


def differentiable(outputs: Any) -> list[torch.Tensor]:
    """The tensors in `outputs` (tensors in tuples, lists and dicts) that carry a graph, in the order of a walk."""
    return [tensor for tensor in _tensors(outputs) if tensor.grad_fn is not None]


def tap(outputs: Any, replace: Callable[[int, torch.Tensor], torch.Tensor]) -> Any:
    """`outputs` with each differentiable tensor replaced by `replace(its place in differentiable(outputs), it)`.

    Dicts and lists are changed in place (a Hugging Face `ModelOutput` keeps its attributes in step that way).
    """
    places = iter(range(1 << 62))
    return _tap(outputs, replace, places)


def _tap(value: Any, replace: Callable[[int, torch.Tensor], torch.Tensor], places: Iterator[int]) -> Any:
    if isinstance(value, torch.Tensor):
        return replace(next(places), value) if value.grad_fn is not None else value
    if isinstance(value, tuple):
        return _rebuild(value, [_tap(item, replace, places) for item in value])
    if isinstance(value, list):
        value[:] = [_tap(item, replace, places) for item in value]
    elif isinstance(value, dict):
        for key in list(value):
            value[key] = _tap(value[key], replace, places)
    return value


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)


def _keep_tensor(tensor: torch.Tensor, copy: bool) -> KeptTensor:
    if tensor.requires_grad:
        raise Unrecordable("an input requires gradients, so the graph goes on outside of the engine")
    if copy or tensor.is_inference() or tensor.nbytes <= _COPY_BYTES_MAX:
        return KeptTensor(tensor.detach().clone(), None)
    return KeptTensor(tensor, tensor._version)


def _rebuild(like: Any, items: list[Any]) -> Any:
    if isinstance(like, tuple):
        return type(like)(*items) if hasattr(like, "_fields") else tuple(items)
    return items
