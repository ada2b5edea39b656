"""A 64-bit mark of what went into a forward: equal inputs have equal marks, and others differ.

Tensors on a device are marked there, so that nothing waits for it until the mark is read. Values of types that nobody
here knows count with their type's name only.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import xxhash

from resilience.guard.fingerprint import fingerprint

__all__ = ["InputMark"]

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size, enum.Enum, slice)


class InputMark:
    """The mark of `values`, taken now; `value` waits for devices.

    Args:
        values: arguments of a forward: tensors, numbers, text, numpy arrays, nested in tuples, lists and mappings.
    """

    def __init__(self, values: Any) -> None:
        self._hash = xxhash.xxh3_64()
        self._on_devices: list[torch.Tensor] = []
        self._add(values)

    def value(self) -> str:
        """The mark, 16 hexadecimal digits."""
        for mark in self._on_devices:
            self._hash.update(b"%d;" % int(mark))
        self._on_devices.clear()
        return self._hash.hexdigest()

    def _add(self, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            self._add_tensor(value)
        elif isinstance(value, _PLAIN):
            self._hash.update(f"{type(value).__name__}:{value!r};".encode())
        elif isinstance(value, np.ndarray):
            self._hash.update(f"array:{value.dtype}:{value.shape};".encode() + value.tobytes())
        elif isinstance(value, Mapping):
            self._hash.update(f"mapping:{len(value)};".encode())
            for key, item in value.items():
                self._hash.update(f"{key!r}=".encode())
                self._add(item)
        elif isinstance(value, (tuple, list)):
            self._hash.update(f"{len(value)} items;".encode())
            for item in value:
                self._add(item)
        else:
            self._hash.update(f"{type(value).__module__}:{type(value).__qualname__};".encode())

    def _add_tensor(self, tensor: torch.Tensor) -> None:
        tensor = tensor.detach()
        self._hash.update(f"tensor:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        if tensor.layout is not torch.strided or tensor.device.type == "meta":
            return
        if tensor.device.type == "cpu":
            self._hash.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        else:
            self._on_devices.append(fingerprint(tensor))
