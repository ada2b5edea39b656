"""The checksum kernel against its oracle: odd shapes, any strides, every dtype, values that are not finite, a fault."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("triton", reason="triton has builds for Linux only")
from resilience.kernels.checksum import oracle
from resilience.kernels.checksum.sweep import DTYPES, MAX_COLUMNS, Fault, Sweep, longest_chain, sweep

SHAPES = [(1, 1), (1, 300), (67, 1), (5, 17), (70, 130), (131, 257)]


def noise(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(swept: Sweep, matrix: torch.Tensor, right: torch.Tensor | None, left: torch.Tensor | None) -> None:
    """Every sum is within the round-off that its own terms allow."""
    chain = longest_chain(*matrix.shape[-2:])
    for sums, of, weights in ((swept.rows, matrix, right), (swept.columns, matrix.mT, left)):
        if weights is None:
            assert sums is None
            continue
        assert sums is not None
        assert sums.dtype == torch.float32
        expected = oracle.weighted_sums(of, weights)
        assert sums.shape == expected.shape
        assert sums.mT.is_contiguous(), "every vector of sums lies contiguous"
        error = (sums.double() - expected).abs()
        assert bool((error <= oracle.roundoff(of, weights, length=chain)).all()), error.max()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", sorted(DTYPES, key=str), ids=str)
def test_sums_of_odd_shapes(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    matrix = noise(*shape, dtype=dtype).to(device)
    right, left = noise(shape[1], 2, seed=1).to(device), noise(shape[0], 3, seed=2).to(device)
    check(sweep(matrix, right, left), matrix, right, left)
    check(sweep(matrix, right), matrix, right, None)
    check(sweep(matrix, None, left), matrix, None, left)


@pytest.mark.parametrize("columns", [1, 4, MAX_COLUMNS])
def test_any_number_of_columns(columns: int, device: torch.device) -> None:
    matrix, right = noise(33, 70).to(device), noise(70, columns, seed=1).to(device)
    left = noise(33, MAX_COLUMNS + 1 - columns, seed=2).to(device)
    check(sweep(matrix, right, left), matrix, right, left)


def strided(name: str) -> torch.Tensor:
    whole = noise(40, 90)
    return {
        "rows contiguous": whole,
        "columns contiguous": noise(90, 40).mT,
        "neither": noise(80, 180)[::2, ::2],
        "padded rows": noise(40, 100)[:, 3:93],
        "one row for all": noise(1, 90).expand(40, 90),
        "one value for all": noise(1, 1).expand(40, 90),
    }[name]


@pytest.mark.parametrize(
    "name",
    ["rows contiguous", "columns contiguous", "neither", "padded rows", "one row for all", "one value for all"],
)
def test_any_strides(name: str, device: torch.device) -> None:
    matrix = strided(name).to(device)
    right = noise(2, 90, seed=1).to(device).mT  # as another sweep leaves its sums
    left = noise(40, 2, seed=2).to(device)
    swept = sweep(matrix, right, left, statistics=True)
    check(swept, matrix, right, left)
    assert float(swept.largest) == oracle.largest_finite(matrix)


@pytest.mark.parametrize("transposed", [False, True])
def test_batches_with_weights_of_their_own_or_shared(transposed: bool, device: torch.device) -> None:
    matrix = (noise(3, 50, 20).mT if transposed else noise(3, 20, 50)).to(device)
    for right, left in (
        (noise(3, 50, 2, seed=1), noise(3, 20, 2, seed=2)),
        (noise(50, 2, seed=1), noise(20, 2, seed=2)),
    ):
        right, left = right.to(device), left.to(device)
        check(sweep(matrix, right, left), matrix, right, left)


def test_the_result_is_the_same_in_every_run(device: torch.device) -> None:
    matrix, right, left = noise(300, 70).to(device), noise(70, 2).to(device), noise(300, 2).to(device)
    once, again = sweep(matrix, right, left), sweep(matrix, right, left)
    assert torch.equal(once.rows, again.rows)
    assert torch.equal(once.columns, again.columns)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_shows_in_its_row_and_column_only(value: float, device: torch.device) -> None:
    matrix, right, left = noise(70, 300).to(device), noise(300, 2).to(device), noise(70, 2).to(device)
    matrix[41, 290] = value
    swept = sweep(matrix, right, left, statistics=True)
    assert swept.rows is not None
    assert swept.columns is not None
    assert not bool(swept.rows[41].isfinite().any())
    assert not bool(swept.columns[290].isfinite().any())
    assert int(swept.rows.isfinite().sum()) == 69 * 2
    assert int(swept.columns.isfinite().sum()) == 299 * 2
    assert int(swept.num_not_finite) == 1
    assert float(swept.largest) == oracle.largest_finite(matrix)


@pytest.mark.parametrize("shape", [(70, 300), (2, 70, 40)], ids=str)
def test_statistics_without_sums(shape: tuple[int, ...], device: torch.device) -> None:
    matrix = noise(*shape, dtype=torch.bfloat16).to(device)
    matrix[..., 3, ::7] = float("nan")
    swept = sweep(matrix, statistics=True)
    assert swept.rows is None
    assert swept.columns is None
    assert float(swept.largest) == oracle.largest_finite(matrix)
    assert int(swept.num_not_finite) == oracle.count_not_finite(matrix) > 0


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 5, 3), (2, 0, 3)], ids=str)
def test_sums_over_nothing_are_zero(shape: tuple[int, ...], device: torch.device) -> None:
    matrix = torch.empty(shape, device=device)
    right, left = torch.ones(shape[-1], 2, device=device), torch.ones(shape[-2], 2, device=device)
    swept = sweep(matrix, right, left, statistics=True)
    assert swept.rows is not None
    assert swept.columns is not None
    assert swept.rows.shape == (*shape[:-1], 2)
    assert swept.columns.shape == (*shape[:-2], shape[-1], 2)
    assert not bool(swept.rows.any() | swept.columns.any())
    assert int(swept.num_not_finite) == 0


@pytest.mark.parametrize("transposed", [False, True])
def test_a_fault_strikes_one_load(transposed: bool, device: torch.device) -> None:
    matrix = (noise(2, 60, 70).mT if transposed else noise(2, 70, 60)).to(device)
    right, left = noise(60, 2, seed=1).to(device), noise(70, 2, seed=2).to(device)
    struck = matrix.clone()
    struck[1, 33, 44] = 1e4
    swept = sweep(matrix, right, left, fault=Fault(matrix=1, row=33, column=44, value=1e4))
    check(swept, struck, right, left)
    clean = sweep(matrix, right, left)
    assert int((swept.rows != clean.rows).any(-1).sum()) == 1
    assert int((swept.columns != clean.columns).any(-1).sum()) == 1


def test_swapped_elements_of_a_row_show_in_the_weighted_sum(device: torch.device) -> None:
    matrix = noise(10, 64).to(device)
    position = torch.arange(1.0, 65.0, device=device)
    right = torch.stack([torch.ones_like(position), position], dim=1)
    clean = sweep(matrix, right).rows
    matrix[4, [10, 50]] = matrix[4, [50, 10]]
    swapped = sweep(matrix, right).rows
    assert clean is not None
    assert swapped is not None
    torch.testing.assert_close(swapped[:, 0], clean[:, 0], rtol=1e-5, atol=1e-5)
    assert float((swapped[4, 1] - clean[4, 1]).abs()) > 1.0
