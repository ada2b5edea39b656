"""Tests that need a CUDA device. `scripts/gpu-check` runs them; without a device each is skipped and says so."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def cuda() -> torch.device:
    """The device under test."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device; scripts/gpu-check runs it on a machine that has one")
    return torch.device("cuda")
