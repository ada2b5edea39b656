"""The checks of one GEMM: silent on clean ones whatever they hold, loud on faults, honest about bad inputs."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resilience.abft import checksum
from resilience.abft.checksum import confirm, deferred_residual
from resilience.abft.expectation import Expectations
from resilience.abft.gemm import Gemm, parse_gemm
from resilience.abft.sums import WeightSums
from resilience.events import DetectionKind

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def screen(gemm: Gemm, out: torch.Tensor, sums: WeightSums | None = None, *, finite_rows: bool = False) -> torch.Tensor:
    """The first stage, of a product on its own."""
    expectation = Expectations(sums or WeightSums()).alone(gemm, out)
    return checksum.screen(gemm, expectation.sums, expectation.observed(out), out.dtype, finite_rows=finite_rows)


def detected(gemm: Gemm, out: torch.Tensor) -> DetectionKind | None:
    """Both stages, as on a CPU."""
    if float(screen(gemm, out).max()) <= 1.0:
        return None
    return confirm(gemm, out, screen(gemm, out, finite_rows=True)).kind


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def heavy(*shape: int, seed: int = 0) -> torch.Tensor:
    return normal(*shape, seed=seed) * normal(*shape, seed=seed + 1).mul(2).exp()


def massive(*shape: int, seed: int = 0) -> torch.Tensor:
    x = normal(*shape, seed=seed)
    x[..., 0, :] *= 300.0
    x[..., :, -1] *= 100.0
    return x


def centred(*shape: int, seed: int = 0) -> torch.Tensor:
    x = normal(*shape, seed=seed)
    return x - x.mean(-1, keepdim=True)


CONTENTS: dict[str, Callable[..., torch.Tensor]] = {
    "normal": normal,
    "heavy": heavy,
    "massive": massive,
    "shifted": lambda *shape, seed=0: normal(*shape, seed=seed) + 3,
    "row_scales": lambda *shape, seed=0: normal(*shape, seed=seed) * normal(*shape[:-1], 1, seed=seed + 1).mul(3).exp(),
    "sparse": lambda *shape, seed=0: normal(*shape, seed=seed) * (normal(*shape, seed=seed + 1) > 2),
    "zero": lambda *shape, seed=0: torch.zeros(*shape),
    "constant": lambda *shape, seed=0: torch.full(shape, 1.7),
    "denormal": lambda *shape, seed=0: normal(*shape, seed=seed) * 1e-39,
    "tiny": lambda *shape, seed=0: normal(*shape, seed=seed) * 1e-25,
    "large": lambda *shape, seed=0: normal(*shape, seed=seed) * 1e15,
    "overflowing": lambda *shape, seed=0: normal(*shape, seed=seed) * 1e25,
    "centred": centred,
}
SHAPES = [
    (0, 65, 33, 70),
    (0, 1, 200, 1),
    (0, 100, 1, 100),
    (0, 7, 300, 513),
    (6, 40, 16, 40),
    (3, 40, 40, 16),
    (1, 2, 3, 4),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("left", CONTENTS)
def test_clean_products_raise_no_alarm(dtype: torch.dtype, left: str) -> None:
    for batch, m, k, n in SHAPES:
        lead = (batch,) if batch else ()
        for seed, right in enumerate(CONTENTS):
            a = CONTENTS[left](*lead, m, k, seed=seed).to(dtype)
            b = CONTENTS[right](*lead, k, n, seed=seed + 50).to(dtype)
            for one, other in ((a, b), (a.mT.contiguous().mT, b), (a, b.mT.contiguous().mT)):
                assert detected(Gemm(one, other), one @ other) is None, (batch, m, k, n, right)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_screen_itself_is_silent_on_what_models_compute(dtype: torch.dtype) -> None:
    """A screen that often sends clean rows to the second stage would be slow, though never wrong."""
    worst = 0.0
    for seed in range(12):
        for name in ("normal", "shifted", "row_scales", "massive"):
            a, b = CONTENTS[name](256, 96, seed=seed).to(dtype), normal(96, 384, seed=seed + 9).to(dtype)
            worst = max(worst, float(screen(Gemm(a, b), a @ b).max()))
    assert 0.01 < worst < 1.0


@pytest.mark.parametrize("common", [1e3, 1e4])
def test_terms_that_cancel_exceed_the_screen_and_are_dismissed(common: float) -> None:
    """As gradients of queries are made: rows that sum to 0, by keys that have most of their size in common."""
    left = normal(48, 96, seed=1)
    gemm = Gemm(left - left.mean(1, keepdim=True), common + normal(96, 64, seed=2))
    out = gemm.left @ gemm.right
    assert float(screen(gemm, out).max()) > 4.0, "on a GPU it would be an alarm, until the replay"
    assert detected(gemm, out) is None


@settings(max_examples=60, deadline=None)
@given(
    m=st.integers(1, 40), k=st.integers(1, 40), n=st.integers(1, 40),
    scale=st.sampled_from([1e-30, 1e-3, 1.0, 1e4]), dtype=st.sampled_from(DTYPES),
    alpha=st.sampled_from([1.0, 0.5, -2.0]), beta=st.sampled_from([0.0, 1.0, 3.0]),
    form=st.sampled_from(["vector", "row", "column", "full"]), seed=st.integers(0, 1000),
)  # fmt: skip
def test_clean_products_with_an_addend_raise_no_alarm(
    m: int, k: int, n: int, scale: float, dtype: torch.dtype, alpha: float, beta: float, form: str, seed: int
) -> None:
    a, b = (normal(m, k, seed=seed) * scale).to(dtype), normal(k, n, seed=seed + 1).to(dtype)
    shape = {"vector": (n,), "row": (1, n), "column": (m, 1), "full": (m, n)}[form]
    d = normal(*shape, seed=seed + 2).to(dtype)
    gemm = parse_gemm("addmm", (d, a, b), {"alpha": alpha, "beta": beta})
    assert gemm is not None
    assert detected(gemm, torch.addmm(d, a, b, alpha=alpha, beta=beta)) is None


def test_empty_and_integer_products_are_left_alone() -> None:
    assert parse_gemm("mm", (torch.ones(0, 3), torch.ones(3, 2)), {}) is None
    assert parse_gemm("mm", (torch.ones(2, 0), torch.ones(0, 2)), {}) is None
    assert parse_gemm("mm", (torch.ones(2, 2, dtype=torch.int64), torch.ones(2, 2, dtype=torch.int64)), {}) is None
    assert parse_gemm("mm", (torch.ones(2, 2, dtype=torch.complex64),) * 2, {}) is None
    for factor in ("alpha", "beta"):
        assert parse_gemm("addmm", (torch.ones(2, 2),) * 3, {factor: 1j}) is None


def example(dtype: torch.dtype, *, batch: int = 0, seed: int = 0) -> tuple[Gemm, torch.Tensor]:
    lead = (batch,) if batch else ()
    a, b = normal(*lead, 96, 64, seed=seed).to(dtype), normal(*lead, 64, 128, seed=seed + 1).to(dtype)
    return Gemm(a, b), a @ b


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [0, 3])
@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (float("inf"), DetectionKind.INF),
        (float("-inf"), DetectionKind.INF),
        (float("nan"), DetectionKind.NAN),
        ("near_inf", DetectionKind.NEAR_INF),
        (30.0, DetectionKind.MISMATCH),
    ],
)
def test_every_extreme_value_is_found_and_named(
    dtype: torch.dtype, batch: int, value: float | str, kind: DetectionKind
) -> None:
    for place in range(0, 96 * 128, 977):
        gemm, out = example(dtype, batch=batch)
        out.view(-1)[place] = 0.9 * torch.finfo(dtype).max if value == "near_inf" else float(value)
        assert detected(gemm, out) is kind


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_a_column_or_all_of_it_gone_is_found(dtype: torch.dtype) -> None:
    for index in ((3,), (slice(None), 5), (slice(None),), (slice(None, None, 4), slice(None, None, 32))):
        gemm, out = example(dtype)
        out[index] = 0.0
        assert detected(gemm, out) is DetectionKind.MISMATCH


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_swapped_rows_are_found(dtype: torch.dtype) -> None:
    gemm, out = example(dtype)
    out[[4, 9]] = out[[9, 4]]
    assert detected(gemm, out) is DetectionKind.MISMATCH


def bit_positions(dtype: torch.dtype) -> range:
    """From the fourth bit of the mantissa below its top up to the exponent's top."""
    return range(20, 31) if dtype == torch.float32 else range(5, 15)


def campaign(dtype: torch.dtype, corrupt: Callable[[torch.Tensor, int], None], *, trials: int = 200) -> float:
    """Share of faults that are found."""
    found = 0
    for trial in range(trials):
        gemm, out = example(dtype, seed=trial)
        flat = out.view(-1)
        corrupt(flat, (trial * 6151) % flat.numel())
        found += detected(gemm, out) is not None
    return found / trials


def change_by(rms: float) -> Callable[[torch.Tensor, int], None]:
    def corrupt(flat: torch.Tensor, place: int) -> None:
        flat[place] += rms * float(flat.float().square().mean().sqrt())

    return corrupt


def swap(flat: torch.Tensor, place: int) -> None:
    row = place // 128 * 128
    one, other = row + place % 128, row + (place * 7 + 31) % 128
    flat[[one, other]] = flat[[other, one]]


def multiply_large(flat: torch.Tensor, place: int) -> None:
    largest = flat.view(-1, 128)[place // 128].abs().argmax() + place // 128 * 128
    flat[largest] *= 1.5


def zero_large(flat: torch.Tensor, place: int) -> None:
    flat[flat.view(-1, 128)[place // 128].abs().argmax() + place // 128 * 128] = 0.0


@pytest.mark.parametrize(
    ("dtype", "corrupt", "at_least"),
    [
        (torch.float32, change_by(1e-3), 1.0),
        (torch.float32, change_by(1e-4), 0.9),
        (torch.float32, multiply_large, 1.0),
        (torch.float32, zero_large, 1.0),
        (torch.float32, swap, 0.97),
        (torch.bfloat16, change_by(2.0), 1.0),
        (torch.bfloat16, change_by(1.0), 1.0),
        (torch.bfloat16, change_by(0.5), 0.8),
        (torch.bfloat16, multiply_large, 0.95),
        (torch.bfloat16, zero_large, 1.0),
        (torch.bfloat16, swap, 0.6),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_share_of_moderate_faults_found(
    dtype: torch.dtype, corrupt: Callable[[torch.Tensor, int], None], at_least: float
) -> None:
    """The figures of docs/detection.md."""
    share = campaign(dtype, corrupt)
    assert share >= at_least, share


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_exponent_bit_flips_are_found(dtype: torch.dtype) -> None:
    integer, bits = (torch.int32, range(24, 31)) if dtype == torch.float32 else (torch.int16, range(9, 15))
    for bit in bits:

        def flip(flat: torch.Tensor, place: int, bit: int = bit) -> None:
            flat.view(integer)[
                flat[place // 128 * 128 : place // 128 * 128 + 128].abs().argmax() + place // 128 * 128
            ] ^= 1 << bit

        assert campaign(dtype, flip, trials=40) == 1.0, bit


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", ["left", "right"])
def test_bad_inputs_are_propagation_and_no_fault(bad: float, side: str) -> None:
    gemm, _ = example(torch.float32)
    getattr(gemm, side)[5, 7] = bad
    out = gemm.left @ gemm.right
    ratio = screen(gemm, out)
    assert not float(ratio.max()) <= 1.0
    confirmation = confirm(gemm, out, screen(gemm, out, finite_rows=True))
    assert confirmation.kind is None
    assert confirmation.inputs_bad
    expectation = Expectations(WeightSums()).alone(gemm, out)
    worst, inputs_bad = deferred_residual(gemm, expectation.sums, expectation.observed(out), out.dtype)
    assert not float(worst) <= 1.0
    assert inputs_bad == 1.0


def test_a_fault_beside_a_bad_input_row_is_still_found() -> None:
    gemm, _ = example(torch.float32)
    gemm.left[5] = float("nan")
    out = gemm.left @ gemm.right
    out[9, 3] += 50.0
    confirmation = confirm(gemm, out, screen(gemm, out, finite_rows=True))
    assert confirmation.kind is DetectionKind.MISMATCH
    assert confirmation.inputs_bad


def test_an_addend_of_minus_infinity_is_a_mask_and_no_fault() -> None:
    q, k = normal(3, 8, 16), normal(3, 16, 8, seed=1)
    mask = torch.full((8, 8), float("-inf")).triu(1)
    gemm = parse_gemm("baddbmm", (mask, q, k), {})
    assert gemm is not None
    out = torch.baddbmm(mask, q, k)
    assert detected(gemm, out) is None
    out[1, 6, 2] += 1.0
    assert detected(gemm, out) is DetectionKind.MISMATCH


def test_results_that_overflow_by_right_are_no_fault() -> None:
    a = torch.full((4, 300), 60000.0, dtype=torch.float16)
    gemm = Gemm(a, a.mT.contiguous())
    out = gemm.left @ gemm.right
    assert out.isinf().all()
    assert detected(gemm, out) is None


def test_stale_weight_sums_cause_no_finding_and_are_dropped() -> None:
    weight = torch.nn.Parameter(normal(64, 128))
    x = normal(96, 64, seed=1)
    sums = WeightSums()
    with torch.no_grad():
        assert float(screen(Gemm(x, weight), x @ weight, sums).max()) <= 1.0
        weight.data.mul_(2.0)
        gemm, out = Gemm(x, weight), x @ weight
        ratio = screen(gemm, out, sums)
        assert float(ratio.max()) > 1.0
        assert confirm(gemm, out, ratio).kind is None
        sums.discard(weight)
        assert float(screen(gemm, out, sums).max()) <= 1.0


def test_stale_bias_sums_cause_no_finding_and_are_dropped() -> None:
    weight, bias = torch.nn.Parameter(normal(64, 128)), torch.nn.Parameter(normal(128, seed=2))
    x = normal(96, 64, seed=1)
    sums = WeightSums()
    with torch.no_grad():
        for factor in (1.0, 100.0):
            bias.data.mul_(factor)
            gemm, out = Gemm(x, weight, bias), torch.addmm(bias, x, weight)
            ratio = screen(gemm, out, sums)
        assert float(ratio.max()) > 1.0
        assert confirm(gemm, out, ratio).kind is None
        sums.discard(bias)
        assert float(screen(gemm, out, sums).max()) <= 1.0


def test_parameters_that_take_turns_in_the_same_memory_keep_their_own_sums() -> None:
    memory = torch.empty(64, 128)
    values = [normal(64, 128, seed=seed) for seed in (1, 2)]
    weights = [torch.nn.Parameter(torch.empty(0)) for _ in values]
    x = normal(96, 64)
    sums = WeightSums()
    with torch.no_grad():
        for weight, value in list(zip(weights, values, strict=True)) * 2:
            memory.copy_(value)
            weight.data = memory
            for right in (weight, weight.view(64, 128)):
                assert float(screen(Gemm(x, right), x @ right, sums).max()) <= 1.0


@pytest.mark.parametrize("shape", [(24, 40), (3, 24, 40)], ids=["single", "batched"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_sums_of_the_next_step_are_those_of_its_weights(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """They may stand where those of the last step stood."""
    weight = torch.nn.Parameter(normal(*shape).to(dtype))
    sums = WeightSums()
    with torch.no_grad():
        for step in range(3):
            sums.clear()
            weight.copy_(normal(*shape, seed=step))
            for right in (weight, weight.mT, weight):
                found, alone = sums.of_right(right, carried=True), WeightSums().of_right(right, carried=True)
                for one, other in zip(found, alone, strict=True):
                    assert one is not None
                    assert other is not None
                    assert torch.equal(one, other)


def test_sums_of_the_same_weights_are_taken_where_they_stood() -> None:
    weight = torch.nn.Parameter(normal(64, 128))
    sums, places = WeightSums(), set()
    for _ in range(4):
        sums.clear()
        found = sums.of_right(weight, carried=True)
        assert found.both is not None
        places.add((found.right.data_ptr(), found.both.data_ptr()))
    assert len(places) == 1


def test_weight_sums_do_not_keep_a_parameter_alive() -> None:
    weight = torch.nn.Parameter(normal(64, 128))
    sums = WeightSums()
    with torch.no_grad():
        sums.of_right(weight.t(), carried=True)
    reference = weakref.ref(weight)
    del weight
    assert reference() is None


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_reduced_internal_precision_of_float32_is_known(precision: str) -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        gemm, out = example(torch.float32)
        assert detected(gemm, out) is None
        out[3, 3] += 100.0
        assert detected(gemm, out) is DetectionKind.MISMATCH
    finally:
        torch.set_float32_matmul_precision(before)


def in_sequence(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left·right, every product added to the sum so far."""
    total = torch.zeros(left.shape[0], right.shape[1], dtype=left.dtype)
    for column, row in zip(left.mT, right, strict=True):
        total += column.unsqueeze(1) * row
    return total


LONG_SUMS = {
    "constant": lambda k, noise: torch.full((4, k), 0.1),
    "nearly constant": lambda k, noise: 0.9 + 1e-3 * noise,
    "there and back": lambda k, noise: 0.1 * torch.cat([torch.ones(4, k // 2), -torch.ones(4, k - k // 2)], 1),
    "half of it": lambda k, noise: 0.1 * (noise > 0.0),
    "drifting": lambda k, noise: noise + 0.3,
    "random": lambda k, noise: noise,
}


@pytest.mark.parametrize("k", [1_025, 16_384, 100_000])
@pytest.mark.parametrize("content", LONG_SUMS)
def test_a_long_sum_in_sequence_is_no_fault(content: str, k: int) -> None:
    """As MKL adds up few results of many terms: of nearly equal ones each rounds the same way."""
    noise = torch.randn(4, k, generator=torch.Generator().manual_seed(k))
    left, right = LONG_SUMS[content](k, noise), torch.ones(k, 3)
    gemm, out = Gemm(left, right), in_sequence(left, right)
    everything = torch.full((4,), torch.inf)
    assert checksum.confirm(gemm, out, everything).kind is None
    out[2, 1] += 1.5e-2 * float(left[2].abs().sum())
    assert checksum.confirm(gemm, out, everything).kind is DetectionKind.MISMATCH


def in_lanes(left: torch.Tensor, right: torch.Tensor, num_lanes: int) -> torch.Tensor:
    """left·right, every `num_lanes`-th product added to the same running sum, and those in the end."""
    lanes = torch.zeros(num_lanes, left.shape[0], right.shape[1], dtype=left.dtype)
    for columns, rows in zip(left.split(num_lanes, 1), right.split(num_lanes), strict=True):
        lanes += columns.mT.unsqueeze(2) * rows.unsqueeze(1)
    return in_sequence(torch.ones(1, num_lanes, dtype=left.dtype), lanes.flatten(1)).view(lanes.shape[1:])


@pytest.mark.parametrize(("num_lanes", "k"), [(2, 1 << 17), (4, 1 << 18), (16, 1 << 18), (64, 1 << 18)])
def test_lanes_of_one_sign_that_cancel_are_no_fault(num_lanes: int, k: int) -> None:
    """As vector units add up: each lane rounds the same way again and again, and no partial sum of all tells."""
    signs = torch.arange(k) % num_lanes < num_lanes // 2
    left, right = torch.where(signs, 0.1, -0.1003).expand(2, k), torch.ones(k, 1)
    gemm, out = Gemm(left, right), in_lanes(left, right, num_lanes)
    everything = torch.full((2,), torch.inf)
    assert checksum.confirm(gemm, out, everything).kind is None
    out[1, 0] += 0.1 * float(left[1].abs().sum())
    assert checksum.confirm(gemm, out, everything).kind is DetectionKind.MISMATCH


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("k", [256, 288, 1_024, 16_384])
def test_equal_terms_after_one_that_outweighs_them_are_no_fault(k: int, dtype: torch.dtype) -> None:
    """All partial sums are as large as the result, from the first one on; the rounding may be all but half a unit."""
    left, right = torch.tensor([[0.1], [0.7], [1.3]] * 3, dtype=dtype).repeat(1, k), torch.ones(k, 1, dtype=dtype)
    left[:, 0] = torch.tensor([0.1, 1.0, 2.0], dtype=dtype).repeat_interleave(3) * k
    gemm, out = Gemm(left, right), in_sequence(left, right)
    assert checksum.confirm(gemm, out, torch.full((9,), torch.inf)).kind is None


def test_the_reference_of_a_long_sum_is_more_exact_than_the_sum() -> None:
    """Also of float64, which a library may add up one after the other as it does the reference."""
    k = 16_384
    left, right = torch.full((8, k), 0.1, dtype=torch.float64), torch.ones(k, 8, dtype=torch.float64)
    left[:, 0] = 0.1 * k
    exact = math.fsum(left[0].tolist())
    total, _ = checksum._long_product(left, right)
    assert float((total - exact).abs().max()) <= 0.02 * float((in_sequence(left, right) - exact).abs().max())


def test_equal_terms_after_an_addend_that_outweighs_them_are_no_fault() -> None:
    k = 16_384
    left, right = torch.full((1, k), 0.1), torch.ones(k, 1)
    for size in (0.1 * k, float(k), 8.0 * k):
        addend = torch.full((1, 1), size)
        # An addend is where a library may begin.
        out = in_sequence(torch.cat([addend, left], 1), torch.ones(k + 1, 1))
        gemm, everything = Gemm(left, right, addend), torch.full((1,), torch.inf)
        assert checksum.confirm(gemm, out, everything).kind is None, size
        out += 1e-2 * (size + 0.1 * k)
        assert checksum.confirm(gemm, out, everything).kind is DetectionKind.MISMATCH


@pytest.mark.parametrize("k", [1_024, 16_384, 100_000])
def test_what_the_bound_of_a_long_sum_lets_pass(k: int) -> None:
    """In units of round-off: signs alike, 16·√k + 1.1·k of the result; random signs, 20·k of the rms."""
    everything, right = torch.full((4,), torch.inf), torch.ones(k, 1)
    alike, random = (16.0 * k**0.5 + 1.1 * k + 16.0) * 0.1 * k, 20.0 * k * k**0.5
    for left, change in ((torch.full((4, k), 0.1), alike), (normal(4, k, seed=k), random)):
        out = (left.double() @ right.double()).float()
        out[2, 0] += 1.05 * change * 2.0**-24
        assert checksum.confirm(Gemm(left, right), out, everything).kind is DetectionKind.MISMATCH
