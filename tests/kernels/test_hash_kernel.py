"""The hash kernel: bit for bit the definition, at odd lengths, far positions, and with a fault."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton has builds for Linux only")
from resilience.kernels.hash import kernel, oracle
from resilience.kernels.hashing import bit_hash


def words(length: int, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(-(1 << 31), 1 << 31, (length,), generator=generator).int().to(device)


def memory(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.cpu().contiguous().view(torch.uint8).tolist())


@pytest.mark.parametrize("length", [0, 1, 1023, 1024, 5 * 1024 + 3])
@pytest.mark.parametrize("offset", [0, 7, (1 << 31) - 600, (1 << 40) + 1])
def test_it_is_its_definition(length: int, offset: int, device: torch.device) -> None:
    values = words(length, device)
    hashed = kernel.hash_words(values, offset)
    assert hashed.dtype == torch.int64
    assert int(hashed) % (1 << 64) == oracle.bit_hash(memory(values), offset=offset)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.float64], ids=str)
def test_any_tensor_has_the_hash_that_torch_gives(
    dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = words(6000, device).view(torch.int8).view(dtype)
    tensors = [whole, whole[1:-1], whole[:12].reshape(3, 4).mT, whole[::3], whole[5], whole[:0]]
    in_torch = [int(bit_hash(tensor.cpu(), offset=3)) for tensor in tensors]
    monkeypatch.setattr("resilience.kernels.triton_kernels", lambda module, tensor: kernel)
    assert [int(bit_hash(tensor, offset=3)) for tensor in tensors] == in_torch


def test_a_fault_strikes_one_word(device: torch.device) -> None:
    values = words(3000, device)
    struck = values.clone()
    struck[2345] ^= 1 << 30
    wrong = kernel.hash_words(values, 5, fault=(2345, 1 << 30))
    assert int(wrong) == int(kernel.hash_words(struck, 5)) != int(kernel.hash_words(values, 5))
