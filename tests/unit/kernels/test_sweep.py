"""The one-pass weighted sums against float64: any shape, stride and dtype, with and without the compiled kernel."""

from __future__ import annotations

import pytest
import torch

from resilience.kernels.sweep import sweep

SHAPES = [(1, 1), (1, 7), (7, 1), (3, 5), (64, 48), (130, 257), (4, 9000), (2, 3, 5), (5, 33, 65)]


def assert_close(found: torch.Tensor | None, matrix: torch.Tensor, weights: torch.Tensor | None) -> None:
    """Within round-off of the sum of magnitudes."""
    assert (found is None) == (weights is None)
    if found is None or weights is None:
        return
    assert found.dtype == torch.float32
    wanted = matrix.double() @ weights.double()
    magnitude = matrix.double().abs() @ weights.double().abs()
    assert found.shape == wanted.shape
    assert bool(((found.double() - wanted).abs() <= 1e-6 * magnitude + 1e-30).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_are_those_of_float64(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(shape, generator=generator).to(dtype)
    right = torch.randn(shape[-1], 2, generator=generator)
    left = torch.randn(shape[-2], 3, generator=generator)
    for each_right, each_left in ((right, left), (right, None), (None, left)):
        rows, columns = sweep(matrix, each_right, each_left)
        assert_close(rows, matrix, each_right)
        assert_close(columns, matrix.mT, each_left)
