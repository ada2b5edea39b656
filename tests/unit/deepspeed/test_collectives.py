"""Where DeepSpeed's padding lies, against the way in which it puts parts together."""

from __future__ import annotations

import hypothesis.strategies as st
import torch
from hypothesis import given

from resilience.deepspeed.collectives import _padding


@given(sizes=st.lists(st.integers(0, 40), min_size=1, max_size=4), num_ranks=st.integers(2, 9))
def test_padding_is_what_no_tensor_fills(sizes: list[int], num_ranks: int) -> None:
    shards = []
    for rank in range(num_ranks):
        for size in sizes:
            part = -(-size // num_ranks)
            filled = min(part, max(0, size - rank * part))
            shards += [True] * filled + [False] * (part - filled)
    places = _padding(tuple(sizes), num_ranks, torch.device("cpu"))
    assert sorted(places.tolist()) == [place for place, is_filled in enumerate(shards) if not is_filled]
