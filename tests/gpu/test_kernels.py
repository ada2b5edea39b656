"""Sums and hash on the device, at the sizes of real layers, through the functions that the checks call."""

from __future__ import annotations

import pytest
import torch

from resilience.kernels import triton_kernels
from resilience.kernels.hashing import bit_hash
from resilience.kernels.sweep import sweep
from tests.gpu.waiting import no_waiting

pytestmark = pytest.mark.gpu


def noise(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, device="cuda", generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(4096, 4096), (8191, 5120), (96, 512, 500)], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_sums_are_within_round_off_and_wait_for_nothing(
    dtype: torch.dtype, shape: tuple[int, ...], transposed: bool, cuda: torch.device
) -> None:
    from resilience.kernels.checksum import oracle
    from resilience.kernels.checksum.sweep import longest_chain

    matrix = noise(*shape, dtype=dtype)
    matrix = matrix.mT if transposed else matrix
    right = noise(matrix.shape[-1], 4, dtype=torch.float32, seed=1)
    left = noise(matrix.shape[-2], 4, dtype=torch.float32, seed=2)
    assert triton_kernels("checksum.sweep", matrix) is not None
    sweep(matrix, right, left)  # compiles
    with no_waiting():
        swept = sweep(matrix, right, left)
    for sums, of, weights in ((swept.rows, matrix, right), (swept.columns, matrix.mT, left)):
        assert sums is not None
        error = (sums.double() - oracle.weighted_sums(of, weights)).abs()
        assert bool((error <= oracle.roundoff(of, weights, length=longest_chain(*matrix.shape[-2:]))).all())
    again = sweep(matrix, right, left)
    assert torch.equal(swept.rows, again.rows)
    assert torch.equal(swept.columns, again.columns)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_the_hash_is_the_one_of_the_cpu(dtype: torch.dtype, cuda: torch.device) -> None:
    words = torch.randint(-(1 << 31), 1 << 31, (3_000_001,), generator=torch.Generator().manual_seed(0)).int()
    whole = words.view(torch.int8)[1:].view(torch.int8).clone().view(torch.int8)
    whole = whole[: whole.numel() // dtype.itemsize * dtype.itemsize].view(dtype)
    for tensor, offset in ((whole, 0), (whole[3:-2], 7), (whole[::3], 0), (whole[: 1 << 20].view(1024, 1024).mT, 5)):
        assert int(bit_hash(tensor.cuda(), offset=offset)) == int(bit_hash(tensor, offset=offset))
    on_device = whole.cuda()
    with no_waiting():
        bit_hash(on_device)


def test_the_hash_of_more_than_2_to_the_31_words_composes(cuda: torch.device) -> None:
    if torch.cuda.mem_get_info()[0] < 10 << 30:
        pytest.skip("needs 10 GB of free memory on the device")
    whole = torch.arange((1 << 31) + 5000, dtype=torch.int32, device=cuda)  # wraps, and is no constant
    middle = (1 << 31) - 1234
    parts = bit_hash(whole[:middle]) + bit_hash(whole[middle:], offset=middle)
    assert int(bit_hash(whole)) == int(parts)
    tail = bit_hash(whole[middle:].cpu(), offset=middle)
    assert int(bit_hash(whole[middle:], offset=middle)) == int(tail)
