"""The checks of a GEMM with the Triton kernels in the place that they have on a GPU."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from types import ModuleType

import pytest
import torch

pytest.importorskip("triton", reason="triton has builds for Linux only")
from resilience.abft.checksum import deferred_residual
from resilience.abft.expectation import Expectations
from resilience.abft.gemm import Gemm
from resilience.abft.sums import WeightSums
from resilience.kernels import sweep


@pytest.fixture(autouse=True)
def in_triton(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that were asked for; without a GPU they run in the interpreter."""
    asked: list[str] = []

    def kernels(module: str, tensor: torch.Tensor) -> ModuleType:
        asked.append(module)
        return importlib.import_module(f"resilience.kernels.{module}")

    monkeypatch.setattr(sweep, "_compiled", None)
    monkeypatch.setattr("resilience.kernels.triton_kernels", kernels)
    return asked


def noise(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def infinite(out: torch.Tensor) -> None:
    out.view(-1)[out.numel() // 3] = math.inf


def shifted(out: torch.Tensor) -> None:
    out.view(-1)[out.numel() // 3] += 20.0 * out.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(48, 40, 72), (2, 24, 16, 20)], ids=["mm", "bmm"])
@pytest.mark.parametrize("corrupt", [None, infinite, shifted])
def test_a_product_and_both_gradients(
    dtype: torch.dtype,
    shape: tuple[int, ...],
    corrupt: Callable[[torch.Tensor], None] | None,
    in_triton: list[str],
    device: torch.device,
) -> None:
    *batch, m, k, n = shape
    left = noise(*batch, m, k, dtype=dtype, seed=0).to(device)
    right = noise(*batch, k, n, dtype=dtype, seed=1).to(device)
    d_out = noise(*batch, m, n, dtype=dtype, seed=2).to(device)
    expectations = Expectations(WeightSums())
    for gemm in (Gemm(left, right), Gemm(d_out, right.mT), Gemm(left.mT, d_out)):
        out = gemm.left @ gemm.right
        expect = expectations.forward if gemm.left is left else expectations.backward
        expectation = expect(gemm, out, 7)
        if corrupt is not None:
            corrupt(out)
        observed = expectation.observed(out)
        worst, inputs_bad = deferred_residual(expectation.gemm, expectation.sums, observed, dtype).tolist()
        assert (worst <= 1.0) == (corrupt is None), worst
        assert inputs_bad == 0.0
    assert set(in_triton) == {"checksum.sweep", "checksum.residual"}
