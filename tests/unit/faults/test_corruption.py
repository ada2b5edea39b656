"""What the kinds do to elements, bit by bit."""

from __future__ import annotations

import random
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from resilience.errors import FaultPlanError
from resilience.faults.corruption import bits_of, corrupted, flip_bits, positions
from resilience.faults.plan import Fault

WIDTH_BY_DTYPE = {torch.float16: 16, torch.bfloat16: 16, torch.float32: 32, torch.float64: 64}
DTYPES = sorted(WIDTH_BY_DTYPE, key=str)


def fault(kind: str, site: str = "linear.out", **more: object) -> Fault:
    return Fault.model_validate({"step": 1, "site": site, "kind": kind, **more})


@given(
    value=st.floats(width=32, allow_nan=False),
    dtype=st.sampled_from(DTYPES),
    data=st.data(),
)
def test_flipping_changes_exactly_these_bits_and_flipping_again_restores(
    value: float, dtype: torch.dtype, data: st.DataObject
) -> None:
    width = WIDTH_BY_DTYPE[dtype]
    bits = tuple(data.draw(st.sets(st.integers(0, width - 1), min_size=1, max_size=4)))
    before = torch.tensor([value, -1.0, 0.0], dtype=torch.float64).to(dtype)
    after = flip_bits(before, bits)
    difference = bits_of(before) ^ bits_of(after)
    expected = {i for i in range(width) if any((int(d) >> i) & 1 for d in difference)}
    assert expected == set(bits)
    assert len({int(d) for d in difference}) == 1
    assert torch.equal(bits_of(flip_bits(after, bits)), bits_of(before))


@given(value=st.floats(width=32, allow_nan=False), bit=st.integers(0, 31))
def test_bits_are_those_of_the_ieee_format(value: float, bit: int) -> None:
    (word,) = struct.unpack("<I", struct.pack("<f", value))
    flipped = flip_bits(torch.tensor([value], dtype=torch.float32), (bit,))
    assert int(bits_of(flipped)[0]) & 0xFFFFFFFF == word ^ (1 << bit)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_highest_bit_is_the_sign_and_the_next_is_missing(dtype: torch.dtype) -> None:
    width = WIDTH_BY_DTYPE[dtype]
    assert torch.equal(flip_bits(torch.tensor([1.5], dtype=dtype), (width - 1,)), torch.tensor([-1.5], dtype=dtype))
    with pytest.raises(FaultPlanError, match=f"bit {width} does not exist in {dtype}; it has bits 0 to {width - 1}"):
        flip_bits(torch.ones(1, dtype=dtype), (width,))


def test_integers_cannot_be_struck() -> None:
    with pytest.raises(FaultPlanError, match=r"torch\.int64"):
        bits_of(torch.ones(1, dtype=torch.int64))


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_of_the_other_kinds(dtype: torch.dtype) -> None:
    values = torch.tensor([1.0, -2.0, 4.0], dtype=dtype)
    assert corrupted(values, fault("inf")).isposinf().all()
    assert corrupted(values, fault("nan")).isnan().all()
    assert not corrupted(values, fault("zero")).any()
    near = corrupted(values, fault("near_inf"))
    assert near.isfinite().all()
    assert float(near[0]) == pytest.approx(0.9 * torch.finfo(dtype).max, rel=0.01)
    assert corrupted(values, fault("stride")).tolist() == [-2.0, 4.0, 1.0]
    assert corrupted(values, fault("scale", factor=1.5)).tolist() == [1.5, -3.0, 6.0]
    assert values.tolist() == [1.0, -2.0, 4.0]


@given(
    num_elements=st.integers(1, 5000),
    index=st.none() | st.integers(0, 5000),
    count=st.none() | st.integers(2, 40),
    kind=st.sampled_from(["inf", "stride"]),
    site=st.sampled_from(["linear.out", "gradient"]),
)
def test_positions_are_inside_or_refused(
    num_elements: int, index: int | None, count: int | None, kind: str, site: str
) -> None:
    this = fault(kind, site, **{k: v for k, v in (("index", index), ("count", count)) if v is not None})
    pitch, default = (32, 2) if kind == "stride" else (1, 1)
    if (index or 0) + ((count or default) - 1) * pitch >= num_elements:
        with pytest.raises(FaultPlanError, match="do not fit a tensor of"):
            positions(this, num_elements, random.Random(0))
        return
    where = positions(this, num_elements, random.Random(0))
    assert where[0] >= 0
    assert where[-1] < num_elements
    assert index is None or where[0] == index
    assert count is None or len(where) == count
    assert where.step == pitch


def test_default_counts() -> None:
    draw = random.Random(0)
    assert len(positions(fault("inf"), 1000, draw)) == 1
    assert len(positions(fault("stride"), 1000, draw)) == 8
    assert len(positions(fault("stride"), 65, draw)) == 3
    assert len(positions(fault("scale", "gradient", factor=2.0), 1000, draw)) == 1000
    assert positions(fault("scale", "gradient", factor=2.0, index=4), 1000, draw) == range(4, 5)
    with pytest.raises(FaultPlanError, match="2 elements from index 0, 32 apart, do not fit a tensor of 32 elements"):
        positions(fault("stride"), 32, draw)
