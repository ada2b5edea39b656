"""The fingerprint of a tensor tells every change of a bit and of the order."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from resilience.guard.fingerprint import fingerprint

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool]


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_bytes_have_equal_fingerprints_whatever_the_strides(dtype: torch.dtype) -> None:
    tensor = torch.arange(12).reshape(3, 4).to(dtype)
    assert fingerprint(tensor) == fingerprint(tensor.clone())
    assert fingerprint(tensor) == fingerprint(tensor.t().contiguous().t())


@given(
    st.lists(st.integers(-(2**31), 2**31 - 1), min_size=2, max_size=64),
    st.data(),
)
def test_any_flipped_bit_and_any_swap_shows(values: list[int], data: st.DataObject) -> None:
    tensor = torch.tensor(values, dtype=torch.int32)
    index = data.draw(st.integers(0, len(values) - 1))
    flipped = tensor.clone()
    flipped[index] ^= 1 << data.draw(st.integers(0, 30))
    assert fingerprint(flipped) != fingerprint(tensor)
    swapped = tensor.clone()
    other = data.draw(st.integers(0, len(values) - 1))
    swapped[[index, other]] = tensor[[other, index]]
    assert (fingerprint(swapped) != fingerprint(tensor)) == (values[index] != values[other])


def test_two_equal_flips_do_not_cancel() -> None:
    tensor = torch.zeros(1000, dtype=torch.int32)
    struck = tensor.clone()
    struck[[10, 700]] ^= 1 << 20
    assert fingerprint(struck) != fingerprint(tensor)


def test_chunks_do_not_show() -> None:
    tensor = torch.randn((1 << 20) + 17, generator=torch.Generator().manual_seed(0))
    struck = tensor.clone()
    struck[-1] = -struck[-1]
    assert fingerprint(tensor) != fingerprint(struck)
    assert fingerprint(tensor) == fingerprint(tensor.clone())


def test_nan_is_equal_to_itself_and_zero_is_not_its_negative() -> None:
    assert fingerprint(torch.tensor([float("nan")])) == fingerprint(torch.tensor([float("nan")]))
    assert fingerprint(torch.tensor([0.0])) != fingerprint(torch.tensor([-0.0]))
    assert fingerprint(torch.zeros(3)) != fingerprint(torch.zeros(4))
