"""Where kernels under test run: compiled on a CUDA device, else in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

__all__ = ["launching"]


@contextmanager
def launching(device: torch.device) -> Iterator[None]:
    """Around launches. The interpreter takes tensors of a CUDA device, too, and gives other bits than the device."""
    if device.type == "cuda":
        yield
        return
    pytest.importorskip("triton", reason="triton has builds for Linux only")
    from tests.kernels.interpreter import interpreting

    with interpreting():
        yield
