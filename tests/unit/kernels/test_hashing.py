"""The compiled form of the hash: each instruction set against the definition, and what chooses it."""

from __future__ import annotations

from collections.abc import Iterator

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from resilience.kernels import hashing
from resilience.kernels.hash.oracle import bit_hash as oracle
from resilience.kernels.hashing import bit_hash

if hashing._compiled is None:
    pytest.skip("not compiled here", allow_module_level=True)
compiled = hashing._compiled
FORMS = [name for name in ("plain", "avx2", "avx512") if compiled.use(name)]
"""From the simplest to the best, which stays in use."""

OFFSETS = [0, 1, 15, 65535, 65537, 2**31 - 70000, 2**31 - 7, 2**33 + 12345, 2**40 + 1]


@pytest.fixture(autouse=True)
def best_form() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    compiled.use(FORMS[-1])
    torch.set_num_threads(threads)


def memory(num_bytes: int) -> torch.Tensor:
    return torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def by_torch(tensor: torch.Tensor, offset: int) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hashing, "_compiled", None)
        return int(bit_hash(tensor, offset=offset))


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    num_bytes=st.integers(0, 1500), start=st.integers(0, 70), offset=st.sampled_from(OFFSETS) | st.integers(0, 2**45)
)
def test_hash_is_that_of_the_definition(form: str, num_bytes: int, start: int, offset: int) -> None:
    compiled.use(form)
    tensor = memory(num_bytes + start)[start:]
    assert int(bit_hash(tensor, offset=offset)) % 2**64 == oracle(bytes(tensor.tolist()), offset=offset)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("offset", OFFSETS)
def test_long_memory_is_hashed_as_torch_does(form: str, offset: int) -> None:
    compiled.use(form)
    tensor = memory(600_003)
    wanted = by_torch(tensor, offset)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert int(bit_hash(tensor, offset=offset)) == wanted


def test_dtypes_and_strides_are_hashed_in_row_major_order() -> None:
    matrix = torch.randn(150, 211, generator=torch.Generator().manual_seed(1))
    for tensor in (matrix, matrix.bfloat16(), matrix.mT, matrix.bfloat16()[3:, ::2], matrix[0, 0], matrix > 0):
        hashed = bit_hash(tensor, offset=5)
        assert hashed.dtype == torch.int64
        assert hashed.shape == ()
        assert int(hashed) == by_torch(tensor, 5)
