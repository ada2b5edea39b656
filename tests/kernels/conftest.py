"""Kernels run compiled on a CUDA device, else in Triton's interpreter on the CPU; memory starts poisoned."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.kernels.launching import launching


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the kernels under test run."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def launches(device: torch.device) -> Iterator[None]:
    """Without a CUDA device every launch of a kernel runs in the interpreter."""
    with launching(device):
        yield


@pytest.fixture(autouse=True)
def poison(device: torch.device) -> Iterator[None]:
    """`torch.empty` gives NaN, or the largest integer: what a kernel forgets to write does not look like zero."""
    if device.type == "cuda":
        yield  # deterministic algorithms would refuse some operators there
        return
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
