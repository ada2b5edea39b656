"""Numerical primitives of the checks, in the form that is fastest where the tensors live.

Plain functions of tensors: no state, no thresholds, no knowledge of sites or steps. Each has a form in torch in its
module here, `sweep` and `hashing`; where Triton's form takes its place is decided here and nowhere else.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import subprocess
import sys
from collections.abc import Callable
from types import ModuleType
from typing import TypeVar

import torch

__all__ = ["launch", "triton_errors", "triton_kernels"]

Result = TypeVar("Result")

_log = logging.getLogger(__name__)

_MIN_CAPABILITY = (8, 0)
"""Of a CUDA device: the kernels read bfloat16, and are compiled in tests for nothing older."""

_given_up: set[tuple[str, int | None]] = set()
"""Modules whose kernels a device, by its index, could not have."""

_CANNOT_RUN = (
    "PassManager::run failed",
    "Triton Error [CUDA]: device kernel image is invalid",
    "Triton Error [CUDA]: no kernel image is available",
    "Triton Error [CUDA]: a PTX JIT compilation failed",
    "Triton Error [CUDA]: the provided PTX was compiled with an unsupported toolchain",
)
"""How the RuntimeErrors of Triton's compiler, and of its loader, begin: they have no class of their own. What a device
says otherwise, of memory that is short or of an earlier kernel that broke, begins with `Triton Error [CUDA]`, too.
"""


def launch(module: str, tensor: torch.Tensor, run: Callable[[ModuleType], Result]) -> Result | None:
    """What `run` makes of the Triton kernels that serve `tensor`; None where torch's arithmetic does.

    A kernel that a device cannot have (its shared memory, an assembler that does not know it, a cache that cannot be
    written) is not tried again: nothing may fail in a user's training for that.

    Args:
        module: as in `triton_kernels`.
        tensor: as there.
        run: launches.
    """
    kernels = triton_kernels(module, tensor)
    place = module, tensor.device.index
    if kernels is None or place in _given_up:
        return None
    try:
        return run(kernels)
    except _possible_errors() as error:
        if not _is_of_compilation(error):
            raise
        _given_up.add(place)
        _log.warning("Triton's kernel %s cannot run on device %s, torch's operators take its place: %s", *place, error)
        return None


def _possible_errors() -> tuple[type[Exception], ...]:
    return RuntimeError, *_compilation_errors()


def _is_of_compilation(error: Exception) -> bool:
    return isinstance(error, _compilation_errors()) or str(error).startswith(_CANNOT_RUN)


def _compilation_errors() -> tuple[type[Exception], ...]:
    return OSError, ImportError, subprocess.CalledProcessError, *triton_errors()


def triton_errors() -> tuple[type[Exception], ...]:
    """What Triton raises that is no error of Python's own classes; nothing while it is not loaded."""
    error = getattr(sys.modules.get("triton"), "TritonError", None)
    return () if error is None else (error,)


def triton_kernels(module: str, tensor: torch.Tensor) -> ModuleType | None:
    """The module of Triton kernels that serves `tensor`, None where torch's arithmetic does.

    Args:
        module: name within this package, such as "checksum.sweep".
        tensor: Triton takes it if it lies on a CUDA device and Triton can launch there.
    """
    return _loaded(module, tensor.device.index) if tensor.is_cuda else None


@functools.cache
def _loaded(module: str, device_index: int) -> ModuleType | None:
    if not _can_launch() or torch.cuda.get_device_capability(device_index) < _MIN_CAPABILITY:
        return None
    return importlib.import_module(f"resilience.kernels.{module}")


@functools.cache
def _can_launch() -> bool:
    """Whether triton is installed (CUDA builds of torch bring it) and works: it needs a C compiler once.

    Without it the arithmetic is torch's, as on a CPU; nothing may fail in a user's forward for that.
    """
    if importlib.util.find_spec("triton") is None:
        return False
    try:
        importlib.import_module("triton.runtime").driver.active.get_current_target()
    except (RuntimeError, ImportError, OSError, AssertionError, subprocess.CalledProcessError) as error:
        _log.warning("Triton cannot launch kernels here, torch's operators take their place: %s", error)
        return False
    return True
