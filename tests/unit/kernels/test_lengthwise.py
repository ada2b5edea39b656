"""Sums of two tensors and of their products, of squares, extremes: any shape, layout and dtype, compiled and not."""

from __future__ import annotations

from collections.abc import Iterator

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from resilience.kernels import lengthwise as module
from resilience.kernels.lengthwise import NUM_WEIGHTS, extremes, moments, pair_sums
from tests.unit.kernels.forms import FORMS, choose, restored

LAYOUTS = ["contiguous", "heads_in_rows", "one part of three", "columns"]

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


def laid_out(shape: tuple[int, int, int, int], layout: str, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Random numbers of this shape: contiguous, with heads side by side in rows, a part of such rows, or transposed."""
    batch, heads, length, width = shape
    generator = torch.Generator().manual_seed(seed)
    if layout == "contiguous":
        return torch.randn(shape, generator=generator).to(dtype)
    if layout == "columns":
        return torch.randn(batch, heads, width, length, generator=generator).to(dtype).mT
    parts = 3 if layout == "one part of three" else 1
    rows = torch.randn(batch, length, parts * heads, width, generator=generator).to(dtype)
    return rows[:, :, heads * (parts - 1) :].transpose(1, 2)


def weights_of(length: int) -> torch.Tensor:
    return torch.randn(NUM_WEIGHTS, length, generator=torch.Generator().manual_seed(3)).T


def assert_right(one: torch.Tensor, other: torch.Tensor) -> None:
    weights = weights_of(one.shape[2])
    found = pair_sums(one, other, weights)
    assert found.dtype == torch.float32
    assert found.shape == (3, NUM_WEIGHTS, one.shape[0], one.shape[1], one.shape[3])
    for sums, terms in zip(found, (one.double(), other.double(), one.double() * other.double()), strict=True):
        wanted = torch.einsum("bhtd,tc->cbhd", terms, weights.double())
        magnitude = torch.einsum("bhtd,tc->cbhd", terms.abs(), weights.double().abs())
        assert bool(((sums.double() - wanted).abs() <= TOLERANCE * magnitude).all())


SHAPES = st.tuples(
    st.integers(1, 3),
    st.integers(1, 5),
    st.sampled_from([1, 3, 4, 127, 128, 130, 517]),
    st.sampled_from([1, 7, 16, 17, 64, 80, 300]),
)


@settings(max_examples=60, deadline=None)
@given(
    form=st.sampled_from(FORMS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    layouts=st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS)),
    shape=SHAPES,
)
def test_sums_are_those_of_float64(
    form: str, dtype: torch.dtype, layouts: tuple[str, str], shape: tuple[int, int, int, int]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if choose(module, form, patch):
            assert_right(*(laid_out(shape, layout, dtype, seed) for seed, layout in enumerate(layouts)))


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 3e38])
@pytest.mark.parametrize("place", [0, 129, 517])
@pytest.mark.parametrize("side", [0, 1])
def test_what_is_not_finite_comes_through_in_its_own_column_only(
    form: str, side: int, place: int, value: float
) -> None:
    pair = [laid_out((2, 3, 518, 20), "heads_in_rows", torch.float32, seed) for seed in range(2)]
    clean = pair_sums(pair[0], pair[1], weights_of(518))
    pair[side][1, 2, place, 7] = value
    pair[1 - side][1, 2, place, 7] = 4000.0  # a product beyond the range of float32
    struck = pair_sums(pair[0], pair[1], weights_of(518))
    assert not bool(struck[2, :, 1, 2, 7].isfinite().any())
    assert bool((struck[side, :, 1, 2, 7].abs() > 1e36).logical_or(struck[side, :, 1, 2, 7].isnan()).all())
    untouched = torch.ones_like(clean, dtype=torch.bool)
    untouched[:, :, 1, 2, 7] = False
    torch.testing.assert_close(struck[untouched], clean[untouched], rtol=1e-4, atol=1e-3)


@settings(max_examples=60, deadline=None)
@given(
    form=st.sampled_from(FORMS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    layout=st.sampled_from(LAYOUTS),
    shape=SHAPES,
)
def test_moments_are_those_of_float64(
    form: str, dtype: torch.dtype, layout: str, shape: tuple[int, int, int, int]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if not choose(module, form, patch):
            return
        operand, weights = laid_out(shape, layout, dtype, 0), weights_of(shape[2])
        *sums, squares = moments(operand, weights).double()
        wanted = torch.einsum("bhtd,tc->cbhd", operand.double(), weights.double())
        magnitude = torch.einsum("bhtd,tc->cbhd", operand.double().abs(), weights.double().abs())
        assert bool(((torch.stack(sums) - wanted).abs() <= TOLERANCE * magnitude).all())
        torch.testing.assert_close(squares, operand.double().square().sum(2), rtol=2e-6, atol=0.0)


@settings(max_examples=60, deadline=None)
@given(
    form=st.sampled_from(FORMS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    layout=st.sampled_from(LAYOUTS),
    shape=SHAPES,
)
def test_extremes_are_those_of_torch(
    form: str, dtype: torch.dtype, layout: str, shape: tuple[int, int, int, int]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if choose(module, form, patch):
            operand = laid_out(shape, layout, dtype, 0)
            assert torch.equal(extremes(operand), torch.stack([operand.amin(2), operand.amax(2)]).float())


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 3e38])
@pytest.mark.parametrize("place", [0, 129, 517])
def test_extremes_of_what_is_not_finite_are_nan_in_its_own_column_only(form: str, place: int, value: float) -> None:
    operand = laid_out((2, 3, 518, 20), "heads_in_rows", torch.float32, 0)
    wanted = torch.stack([operand.amin(2), operand.amax(2)])
    operand[1, 2, place, 7] = value
    wanted[:, 1, 2, 7] = float("nan")
    if value == 3e38:
        wanted[0, 1, 2, 7], wanted[1, 1, 2, 7] = operand[1, 2, :, 7].amin(), value
    torch.testing.assert_close(extremes(operand), wanted, rtol=0.0, atol=0.0, equal_nan=True)


@pytest.mark.skipif(module._compiled is None, reason="needs the compiled kernel")
@pytest.mark.parametrize("layout", LAYOUTS[:3])
def test_bits_do_not_depend_on_threads(layout: str) -> None:
    one, other = (laid_out((2, 12, 517, 64), layout, torch.float32, seed) for seed in range(2))
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(pair_sums(one, other, weights_of(517)))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
