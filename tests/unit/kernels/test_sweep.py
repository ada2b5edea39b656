"""The one-pass weighted sums against float64: any shape, stride and dtype, compiled (each instruction set) and not."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from resilience.kernels import sweep as module
from resilience.kernels.sweep import is_compiled, sweep
from tests.unit.kernels.forms import FORMS, choose, restored

TOLERANCE = 4e-7
"""Relative to the sum of magnitudes: a dozen times the round-off of one float32 addition."""


@pytest.fixture(autouse=True)
def best_form() -> Iterator[None]:
    with restored(module):
        yield


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name = str(request.param)
    if not choose(module, name, monkeypatch):
        pytest.skip(f"no {name} here")
    return name


def numbers(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_close(found: torch.Tensor | None, matrix: torch.Tensor, weights: torch.Tensor | None) -> None:
    """Within round-off of the sum of magnitudes."""
    assert (found is None) == (weights is None)
    if found is None or weights is None:
        return
    wanted = matrix.double() @ weights.double()
    magnitude = matrix.double().abs() @ weights.double().abs()
    assert found.dtype == torch.float32
    assert found.shape == wanted.shape
    assert bool(((found.double() - wanted).abs() <= TOLERANCE * magnitude).all())


def assert_right(matrix: torch.Tensor, right: torch.Tensor | None, left: torch.Tensor | None) -> None:
    rows, columns = sweep(matrix, right, left)
    assert_close(rows, matrix, right)
    assert_close(columns, matrix.mT, left)


# --- every shape, stride and dtype ------------------------------------------------------------------------------------


def laid_out(shape: tuple[int, ...], layout: str) -> torch.Tensor:
    """Random numbers of this shape: contiguous by rows or by columns, a part of a larger matrix, or neither."""
    *batch, m, n = shape
    if layout == "rows":
        return numbers(*shape)
    if layout == "columns":
        return numbers(*batch, n, m).mT
    if layout == "part":
        return numbers(*batch, m + 2, n + 3)[..., 1:-1, 2:-1]
    if layout == "part of columns":
        return numbers(*batch, n + 2, m + 3)[..., 1:-1, 2:-1].mT
    if layout == "one row":
        return numbers(*batch, 1, n).expand(shape)
    assert layout == "neither"
    return numbers(*batch, 2 * m, 2 * n)[..., ::2, ::2]


LAYOUTS = ["rows", "columns", "part", "part of columns", "one row", "neither"]
small = st.integers(1, 20) | st.integers(1, 300)


@settings(max_examples=250, deadline=None, derandomize=True)
@given(
    form=st.sampled_from(FORMS),
    batch=st.none() | st.integers(1, 5),
    m=small,
    n=small,
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    counts=st.tuples(st.integers(0, 8), st.integers(0, 8)),
    shared=st.booleans(),
    transposed=st.booleans(),
)
def test_sums_are_those_of_float64(
    form: str,
    batch: int | None,
    m: int,
    n: int,
    layout: str,
    dtype: torch.dtype,
    counts: tuple[int, int],
    shared: bool,
    transposed: bool,
) -> None:
    def weights(length: int, count: int) -> torch.Tensor | None:
        if count == 0:
            return None
        front = () if batch is None or shared else (batch,)
        return numbers(*front, count, length, seed=2).mT if transposed else numbers(*front, length, count, seed=2)

    matrix = laid_out((m, n) if batch is None else (batch, m, n), layout).to(dtype)
    with pytest.MonkeyPatch.context() as patch:
        if choose(module, form, patch):
            assert_right(matrix, weights(n, counts[0]), weights(m, counts[1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape", [(3, 20001), (20001, 3), (150, 17000), (700, 5000), (1, 1), (2, 130, 4100), (40, 64, 64)], ids=str
)
def test_matrices_that_are_cut_into_several_units(form: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    matrix = numbers(*shape).to(dtype)
    right, left = numbers(shape[-1], 2, seed=2), numbers(shape[-2], 3, seed=3)
    assert_right(matrix, right, left)
    assert_right(matrix.mT, left, right)


def test_round_off_does_not_grow_with_the_matrix(form: str) -> None:
    if form == "torch":
        pytest.skip("the library's own order of additions")
    # All of one sign and not representable: sums one after the other would be off by hundreds of units.
    matrix = torch.full((4096, 4097), 0.1)
    rows, columns = sweep(matrix, torch.ones(4097, 1), torch.ones(4096, 1))
    assert rows is not None
    assert columns is not None
    for sums, length in ((rows, 4097), (columns, 4096)):
        exact = torch.tensor(0.1).double() * length
        assert float((sums.double() / exact - 1).abs().max()) < 16 * 2.0**-24


# --- what is not finite -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [(0, 0), (5, 64), (129, 99), (64, 1100)])
def test_what_is_not_finite_comes_through_and_spoils_nothing_else(
    form: str, place: tuple[int, int], value: float, dtype: torch.dtype
) -> None:
    matrix = numbers(130, 1101).to(dtype)
    matrix[place] = value
    rows, columns = sweep(matrix, torch.ones(1101, 2), torch.ones(130, 2))
    for sums, index in ((rows, place[0]), (columns, place[1])):
        assert sums is not None
        spoilt = torch.full((2,), value)
        assert torch.equal(sums[index].nan_to_num(7.0, 8.0, 9.0), spoilt.nan_to_num(7.0, 8.0, 9.0))
        assert int((~sums.isfinite()).sum()) == 2


def test_a_sum_beyond_the_range_is_infinite(form: str) -> None:
    rows, columns = sweep(torch.full((8, 8), 3e38), torch.ones(8, 1), torch.ones(8, 1))
    assert rows is not None
    assert columns is not None
    assert bool((rows == float("inf")).all())
    assert bool((columns == float("inf")).all())


# --- the compiled form ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2048, 300), (30, 20000), (6, 500, 70)], ids=str)
def test_bits_do_not_depend_on_the_number_of_threads(form: str, shape: tuple[int, ...]) -> None:
    if form == "torch":
        pytest.skip("the library's own order of additions")
    matrix, right, left = numbers(*shape), numbers(shape[-1], 2, seed=2), numbers(shape[-2], 2, seed=3)
    torch.set_num_threads(1)
    serial = sweep(matrix, right, left)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        parallel = sweep(matrix, right, left)
        for one, other in zip(serial, parallel, strict=True):
            assert one is not None
            assert other is not None
            assert torch.equal(one, other)


@pytest.mark.skipif(not is_compiled() or sys.platform != "linux", reason="needs the compiled kernel and libgomp")
def test_threads_come_from_torch() -> None:
    assert module._GOMP_PARALLEL != 0


def test_sums_serve_as_the_next_weights_without_a_copy(form: str) -> None:
    rows, columns = sweep(numbers(9, 17), numbers(17, 3), numbers(9, 2))
    assert rows is not None
    assert columns is not None
    assert rows.mT.is_contiguous()
    assert columns.mT.is_contiguous()
    assert_right(numbers(4, 9, seed=5), rows, None)


def test_what_does_not_fit_is_refused(form: str) -> None:
    matrix = numbers(4, 6)
    for right in (numbers(5, 2), numbers(6, 9), numbers(6, 2).double(), numbers(6)):
        with pytest.raises((AssertionError, IndexError)):
            sweep(matrix, right)
    with pytest.raises(AssertionError):
        sweep(matrix.double(), numbers(6, 2))
    with pytest.raises(AssertionError):
        sweep(matrix[0], numbers(6, 2))


def test_what_is_empty_or_lazily_negated_is_right_too(form: str) -> None:
    for shape in ((0, 6), (4, 0), (0, 4, 6)):
        matrix = numbers(*shape)
        rows, columns = sweep(matrix, numbers(shape[-1], 2), numbers(shape[-2], 2))
        assert rows is not None
        assert columns is not None
        assert torch.equal(rows, torch.zeros(*shape[:-1], 2))
        assert torch.equal(columns, torch.zeros(*shape[:-2], shape[-1], 2))
    negated = torch.imag(torch.complex(numbers(4, 6), numbers(4, 6, seed=2)).conj())
    assert negated.is_neg()
    assert_right(negated, numbers(6, 2), None)
    assert_right(numbers(3, 4), negated, None)


def test_a_precision_that_the_user_lowers_is_not_that_of_the_checks(form: str) -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        assert_right(numbers(65, 130), numbers(130, 2), numbers(65, 2))
    finally:
        torch.set_float32_matmul_precision(before)


def test_autocast_does_not_round_the_sums(form: str) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert_right(numbers(65, 130), numbers(130, 2), numbers(65, 2))


def test_without_the_compiled_module_products_of_torch_serve() -> None:
    program = (
        "import sys; sys.modules['resilience.kernels._sweep'] = None\n"
        "import torch\n"
        "from resilience.kernels.sweep import is_compiled, sweep\n"
        "print(is_compiled(), sweep(torch.ones(2, 3), torch.ones(3, 1)).rows.tolist())"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert answer.stdout.strip() == "False [[3.0], [3.0]]"


def test_a_tensor_without_memory_is_refused() -> None:
    """Never read: a sweep of it would end the process."""
    gone = numbers(4, 6)
    gone.untyped_storage().resize_(0)
    for matrix in (gone, torch.empty(4, 6, device="meta")):
        assert module._compiled is None or module._compiled.sweep(matrix, numbers(6, 2), None, None, None, 0, 1) is None
