"""Numerical primitives of the checks, in the form that is fastest where the tensors live.

Plain functions of tensors: no state, no thresholds, no knowledge of sites or steps. Each has a form in torch in its
module here, `sweep` and `hashing`; where Triton's form takes its place is decided by `triton_kernels` and nowhere else.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from types import ModuleType

import torch

__all__ = ["triton_kernels"]


def triton_kernels(module: str, tensor: torch.Tensor) -> ModuleType | None:
    """The module of Triton kernels that serves `tensor`, None where torch's arithmetic does.

    Args:
        module: name within this package, such as "checksum.sweep".
        tensor: Triton takes it if it lies on a CUDA device and triton is installed (CUDA builds of torch bring it).
    """
    return _loaded(module) if tensor.is_cuda else None


@functools.cache
def _loaded(module: str) -> ModuleType | None:
    if importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module(f"resilience.kernels.{module}")
