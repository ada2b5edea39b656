"""EEC-ABFT: every row of the case table, one error anywhere mended, two never taken for one, clean lines left alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resilience.abft.carried import Encoded, encode, encode_gemm, line_weights, product
from resilience.abft.eec import Status, correct, rebuild, residual_ratio
from resilience.abft.gemm import Gemm, parse_gemm
from resilience.abft.patterns import Pattern
from resilience.abft.thresholds import CARRIED_SIGMAS

M, K, N = 24, 48, 200
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
QUIET = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def operands(dtype: torch.dtype = torch.float32, *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(M, K, generator=generator, dtype=torch.float64).to(dtype),
        torch.randn(K, N, generator=generator, dtype=torch.float64).to(dtype),
    )


def encoded(dtype: torch.dtype = torch.float32, *, sums: torch.dtype = torch.float64, seed: int = 0) -> Encoded:
    left, right = operands(dtype, seed=seed)
    return product(encode(left, sums=sums, rows=False), encode(right, sums=sums, columns=False), left @ right)


def tolerances(one: Encoded, lines: str) -> torch.Tensor:
    """What the sums of each line may be off by."""
    side = getattr(one, lines)
    assert side is not None
    return CARRIED_SIGMAS * side.variance.sqrt()  # type: ignore[no-any-return]


# --- the case table ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "sums", "is_in_row"),
    [
        (30.0, torch.float64, lambda d1, d2: math.isfinite(d1) and math.isfinite(d2)),
        (0.9 * torch.finfo(torch.float32).max, torch.float64, lambda d1, d2: 1e38 < abs(d1) < math.inf > abs(d2)),
        (
            0.9 * torch.finfo(torch.float32).max,
            torch.float32,
            lambda d1, d2: math.isfinite(d1) and not math.isfinite(d2),
        ),
        (math.inf, torch.float64, lambda d1, d2: math.isinf(d1)),
        (-math.inf, torch.float32, lambda d1, d2: math.isinf(d1)),
        (math.nan, torch.float64, lambda d1, d2: math.isnan(d1)),
    ],
    ids=["moderate", "near-INF", "weighted sum overflows", "INF", "-INF", "NaN"],
)
def test_each_row_of_the_case_table_locates_and_rebuilds(value: float, sums: torch.dtype, is_in_row: Any) -> None:
    one = encoded(sums=sums)
    clean = one.value.clone()
    one.value[5, 71] = value
    assert one.rows is not None
    residual = one.rows.sums[5] - one.value[5].to(sums) @ line_weights(N, sums, one.value.device)
    assert is_in_row(float(residual[0]), float(residual[1])), "this input is not of that row of the table"

    found = correct(one.value, one.rows)

    assert found.status[5] == Status.CORRECTED
    assert found.index[5] == 71
    assert found.count(Status.CLEAN) == M - 1
    assert abs(one.value[5, 71] - clean[5, 71]) < 1e-3
    one.value[5, 71] = clean[5, 71]
    assert torch.equal(one.value, clean), "another element was written"


@pytest.mark.parametrize(
    "values",
    [
        (math.inf, math.inf),
        (math.inf, -math.inf),
        (math.nan, math.nan),
        (math.nan, math.inf),
        (1e30, 1e30),
        (1e30, math.inf),
        (1e20, 5.0),
        (40.0, 40.0),
    ],
)
@pytest.mark.parametrize("sums", [torch.float64, torch.float32])
def test_several_suspects_abort(values: tuple[float, float], sums: torch.dtype) -> None:
    one = encoded(sums=sums)
    one.value[5, 70], one.value[5, 90] = values
    before = one.value.clone()
    assert one.rows is not None
    found = correct(one.value, one.rows)
    assert found.status[5] == Status.SEVERAL
    assert found.index[5] == -1
    assert torch.equal(one.value.nan_to_num(nan=7.0), before.nan_to_num(nan=7.0))


def test_two_errors_that_both_weights_take_for_one_in_between_are_told_by_the_signs() -> None:
    one = encoded()
    one.value[5, 70] += 40.0
    one.value[5, 90] += 40.0
    before = one.value.clone()
    assert one.rows is not None
    residual = one.rows.sums[5] - one.value[5].double() @ line_weights(N, torch.float64, one.value.device)
    assert abs(float(residual[1] / residual[0]) - 81.0) < 1e-4, "the weights do not point between the two"
    assert correct(one.value, one.rows).status[5] == Status.SEVERAL
    assert torch.equal(one.value, before)


def test_swapped_elements_are_seen_though_the_plain_sum_is_right() -> None:
    one = encoded()
    one.value[3, [10, 11]] = one.value[3, [11, 10]]
    assert one.rows is not None
    assert correct(one.value, one.rows).status[3] == Status.SEVERAL


def test_sums_that_are_not_finite_themselves_are_named_and_nothing_is_written() -> None:
    left, right = operands()
    left[4, 2] = math.inf
    one = product(encode(left, rows=False), encode(right, columns=False), left @ right)
    before = one.value.clone()
    assert one.rows is not None
    found = correct(one.value, one.rows)
    assert found.status[4] == Status.NO_SUMS
    assert found.count(Status.CLEAN) == M - 1
    assert torch.equal(one.value.nan_to_num(nan=7.0), before.nan_to_num(nan=7.0))


# --- properties -------------------------------------------------------------------------------------------------------

errors = st.one_of(
    st.sampled_from([math.inf, -math.inf, math.nan]),
    st.tuples(st.floats(0.7, 36.0), st.sampled_from([1.0, -1.0])).map(lambda drawn: drawn[1] * 10.0 ** drawn[0]),
)
"""Not finite, or a multiple of the tolerance from 5 to near-INF."""


def struck(clean: torch.Tensor, error: float, tolerance: float, largest: float) -> torch.Tensor:
    if not math.isfinite(error):
        return torch.tensor(error)
    return (clean.double() + error * tolerance).clamp(-0.9 * largest, 0.9 * largest)


@QUIET
@given(
    st.sampled_from(DTYPES),
    st.sampled_from([torch.float64, torch.float32]),
    st.sampled_from([-1, -2]),
    st.integers(0, M - 1),
    st.integers(0, N - 1),
    errors,
    st.integers(0, 20),
)
def test_any_single_error_is_located_and_mended_within_round_off(
    dtype: torch.dtype, sums: torch.dtype, dim: int, row: int, column: int, error: float, seed: int
) -> None:
    one = encoded(dtype, sums=sums, seed=seed)
    side, line, where = (one.rows, row, column) if dim == -1 else (one.columns, column, row)
    assert side is not None
    tolerance = float(tolerances(one, "rows" if dim == -1 else "columns")[line])
    clean = one.value.clone()
    one.value[row, column] = struck(clean[row, column], error, tolerance, torch.finfo(dtype).max)
    found = correct(one.value, side, dim=dim)
    assert found.status[line] == Status.CORRECTED
    assert found.index[line] == where
    assert found.count(Status.CLEAN) == found.status.numel() - 1
    assert abs(one.value[row, column].double() - clean[row, column].double()) <= tolerance


@QUIET
@given(
    st.sampled_from(DTYPES),
    st.sampled_from([torch.float64, torch.float32]),
    st.integers(0, M - 1),
    st.lists(st.integers(0, N - 1), min_size=2, max_size=4, unique=True),
    st.lists(errors, min_size=4, max_size=4),
    st.booleans(),
    st.integers(0, 20),
)
def test_several_errors_in_a_line_are_never_called_corrected(
    dtype: torch.dtype,
    sums: torch.dtype,
    row: int,
    columns: list[int],
    sizes: list[float],
    same: bool,
    seed: int,
) -> None:
    one = encoded(dtype, sums=sums, seed=seed)
    assert one.rows is not None
    tolerance = float(tolerances(one, "rows")[row])
    for column, size in zip(columns, sizes, strict=False):
        size = sizes[0] if same else size
        one.value[row, column] = struck(one.value[row, column], size, tolerance, torch.finfo(dtype).max)
    before = one.value.clone()
    found = correct(one.value, one.rows)
    assert found.status[row] in (Status.SEVERAL, Status.UNSURE)
    assert torch.equal(one.value.nan_to_num(nan=7.0), before.nan_to_num(nan=7.0))


def contents() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    normal = torch.randn(64, 64, generator=generator, dtype=torch.float64)
    return {
        "normal": normal,
        "heavy tails": normal.sign() * normal.abs() ** 4,
        "shifted": normal + 30.0,
        "constant": torch.full((64, 64), 0.37, dtype=torch.float64),
        "one massive row": normal * torch.where(torch.arange(64) == 9, 1e3, 1.0).unsqueeze(1).double(),
        "one massive column": normal * torch.where(torch.arange(64) == 9, 1e3, 1.0).double(),
        "sparse": normal * (normal > 1.5),
        "tiny": normal * 1e-4,
        "zero": torch.zeros(64, 64, dtype=torch.float64),
    }


@pytest.mark.parametrize("sums", [torch.float64, torch.float32])
@pytest.mark.parametrize("dtype", DTYPES)
def test_clean_products_of_any_content_are_silent(dtype: torch.dtype, sums: torch.dtype) -> None:
    for left_name, left in contents().items():
        for right_name, right in contents().items():
            for sign in (0.0, -1.0):  # with −1 the products cancel exactly but for one column
                a, b = left.to(dtype), right.to(dtype)
                if sign:
                    a, b = torch.cat([a, a[:, 1:]], 1), torch.cat([b, sign * b[1:]], 0)
                out = a @ b
                if not out.isfinite().all():
                    continue
                one = product(encode(a, sums=sums, rows=False), encode(b, sums=sums, columns=False), out)
                assert one.rows is not None
                assert one.columns is not None
                worst = max(residual_ratio(out, one.rows).max(), residual_ratio(out.mT, one.columns).max())
                assert worst < 1.0, f"{left_name} by {right_name}: {worst}"


def test_sums_are_those_of_the_matrix() -> None:
    one = encoded(torch.float64)
    fresh = encode(one.value)
    for carried, taken in ((one.rows, fresh.rows), (one.columns, fresh.columns)):
        assert carried is not None
        assert taken is not None
        torch.testing.assert_close(carried.sums, taken.sums, rtol=1e-12, atol=1e-9)
        torch.testing.assert_close(
            carried.energy, one.value.square().sum(-1 if carried is one.rows else -2), rtol=1.5, atol=0
        )


def test_strided_and_batched_matrices_are_mended_in_place() -> None:
    generator = torch.Generator().manual_seed(1)
    left, right = torch.randn(2, 3, 20, 16, generator=generator), torch.randn(1, 3, 16, 30, generator=generator)
    out = torch.empty(2, 3, 30, 20).mT
    out.copy_(left @ right)
    one = product(encode(left, rows=False), encode(right, columns=False), out)
    clean = out.clone()
    out[1, 2, 7, 9] = math.nan
    out[0, 1, 3, 4] += 5.0
    assert one.columns is not None
    found = correct(out, one.columns, dim=-2)
    assert found.status.shape == (2, 3, 30)
    assert found.index[1, 2, 9] == 7
    assert found.index[0, 1, 4] == 3
    torch.testing.assert_close(out, clean)


# --- one GEMM ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gemm_is_rebuilt_with_alpha_beta_and_an_addend(dtype: torch.dtype) -> None:
    left, right = operands(dtype)
    bias = torch.linspace(-3.0, 3.0, N).to(dtype)
    gemm = parse_gemm("addmm", (bias, left, right), {"alpha": 0.5, "beta": 2.0})
    assert gemm is not None
    clean = torch.addmm(bias, left, right, alpha=0.5, beta=2.0)
    out = clean.clone()
    repair = rebuild(encode_gemm(gemm, out))
    assert (repair.pattern, repair.clean, repair.num_rebuilt) == (Pattern.CLEAN, True, 0)
    assert torch.equal(out, clean)
    out[7, 3] = math.inf
    repair = rebuild(encode_gemm(gemm, out))
    assert (repair.pattern, repair.clean, repair.num_rebuilt) == (Pattern.ELEMENT, True, 1)
    assert repair.max_ratio == math.inf
    torch.testing.assert_close(out, clean, rtol=0, atol=8 * float(torch.finfo(dtype).eps) * math.sqrt(K) * 6)


def test_sums_taken_before_mend_what_has_overwritten_its_operand() -> None:
    left, right = operands()
    square = right[:, :K].contiguous()
    clean = left @ square
    before = encode_gemm(Gemm(left, square), clean)  # shape and dtype are all it takes from the result
    left.copy_(clean)
    left[2, 5] = math.nan
    repair = rebuild(Encoded(left, before.rows, before.columns))
    assert repair.clean
    torch.testing.assert_close(left, clean)


def test_a_whole_row_is_rebuilt_by_its_columns_and_a_spread_fault_is_put_back() -> None:
    one = encoded()
    clean = one.value.clone()
    one.value[6] = math.nan
    repair = rebuild(one)
    assert (repair.pattern, repair.clean, repair.num_rebuilt) == (Pattern.ROW, True, N)
    torch.testing.assert_close(one.value, clean)
    one.value[2:5, 10:13] += 9.0
    before = one.value.clone()
    repair = rebuild(one)
    assert (repair.pattern, repair.clean, repair.num_rebuilt) == (Pattern.SPREAD, False, 0)
    assert torch.equal(one.value, before)


def test_two_errors_in_a_row_are_rebuilt_by_their_columns() -> None:
    one = encoded()
    clean = one.value.clone()
    one.value[6, [20, 40]] = 77.0
    repair = rebuild(one)
    assert (repair.clean, repair.num_rebuilt) == (True, 2)
    torch.testing.assert_close(one.value, clean)
