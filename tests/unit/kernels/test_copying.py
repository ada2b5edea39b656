"""The compiled copy moves every byte to its place and none beyond, wherever the two begin."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resilience.kernels.copying import copy_past_caches

GUARD = 0xA5


@pytest.fixture(params=["compiled", "by numpy"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "by numpy":
        monkeypatch.setattr("resilience.kernels.copying._compiled", None)
    elif importlib.util.find_spec("resilience.kernels._copy") is None:
        pytest.skip("built without a C compiler")
    return str(request.param)


@settings(max_examples=200, deadline=None)
@given(
    count=st.one_of(st.integers(0, 200), st.integers(16_000, 70_000), st.just(1 << 20)),
    target_at=st.integers(0, 130),
    source_at=st.integers(0, 130),
)
def test_every_byte_comes_to_its_place_and_none_beyond(count: int, target_at: int, source_at: int) -> None:
    source = np.random.default_rng(count).integers(0, 255, source_at + count, dtype=np.uint8)[source_at:]
    room = np.full(target_at + count + 128, GUARD, dtype=np.uint8)
    copy_past_caches(room[target_at : target_at + count], source)
    assert np.array_equal(room[target_at : target_at + count], source)
    assert (room[:target_at] == GUARD).all()
    assert (room[target_at + count :] == GUARD).all()


def test_what_does_not_fit_is_refused_before_anything_is_written(kind: str) -> None:
    target = np.zeros(8, dtype=np.uint8)
    with pytest.raises(ValueError, match=r"not \(9,\) to \(8,\)"):
        copy_past_caches(target, np.ones(9, dtype=np.uint8))
    with pytest.raises(ValueError, match="contiguous"):
        copy_past_caches(target, np.ones(16, dtype=np.uint8)[::2])
    target.flags.writeable = False
    with pytest.raises(ValueError, match="written"):
        copy_past_caches(target, np.ones(8, dtype=np.uint8))
    assert not target.any()


def test_both_ways_copy_the_same(kind: str) -> None:
    source = np.arange(100_000, dtype=np.uint32).view(np.uint8)
    target = np.zeros_like(source)
    copy_past_caches(target, source)
    assert np.array_equal(target, source)
