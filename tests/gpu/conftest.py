"""Tests that need a CUDA device. `scripts/gpu-check` runs them; without a device each is skipped and says so."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from resilience.abft.protection import Protection
from tests.protections import installing


@pytest.fixture(autouse=True)
def cuda() -> torch.device:
    """The device under test."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device; scripts/gpu-check runs it on a machine that has one")
    return torch.device("cuda")


@pytest.fixture
def protect() -> Iterator[Callable[..., Protection]]:
    """Make installed protections of a strength, maybe with an injector; removed after the test."""
    with installing() as make:
        yield lambda strength, injector=None: make({"strength": strength}, injector)
