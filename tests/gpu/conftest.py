"""Tests that need a CUDA device. `scripts/gpu-check` runs them; without a device each is skipped and says so."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from resilience.abft.handlers import Injector
from resilience.abft.protection import Protection
from resilience.config import DetectionConfig


@pytest.fixture(autouse=True)
def cuda() -> torch.device:
    """The device under test."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device; scripts/gpu-check runs it on a machine that has one")
    return torch.device("cuda")


@pytest.fixture
def protect() -> Iterator[Callable[..., Protection]]:
    """Make installed protections of a strength, maybe with an injector; removed after the test."""
    made: list[Protection] = []

    def make(strength: str, injector: Injector | None = None) -> Protection:
        protection = Protection(DetectionConfig.model_validate({"strength": strength}), injector=injector)
        protection.install()
        made.append(protection)
        return protection

    yield make
    for protection in reversed(made):
        protection.uninstall()
