"""An exact 64-bit hash of a tensor's bits: integer arithmetic only, the same on every device and in every form.

The definition and what it is certain to see are in `kernels/hash/README.md`. No policy: who is hashed, how often and
what a difference means is decided elsewhere.
"""

from __future__ import annotations

import torch

from resilience.kernels import launch
from resilience.kernels.threads import gomp_parallel

try:
    from resilience.kernels import _hash as _compiled
except ImportError:  # built without a C compiler
    _compiled = None  # type: ignore[assignment]

__all__ = ["WORD_BYTES", "bit_hash", "num_words"]

WORD_BYTES = 4
"""A word is four bytes of the tensor in memory order, little-endian; the last one is filled up with zeros."""

_MASK = 0x7FFFFFFF
_FIRST, _SECOND, _THIRD, _FOURTH = 0x45D9F3B1, 0x2C1B3C6D, 0x297A2D39, 0x1B56C4E9
"""Odd multipliers below 2^31; those of the definition."""

_CHUNK_WORDS = 1 << 16
"""Words hashed at once: temporaries of a few times 256 KiB stay in a core's cache."""

_CHUNK_WORDS_CUDA = 1 << 24
"""On a GPU: 64 MiB at most are copied at a time, of tensors whose elements do not lie in order."""


def num_words(tensor: torch.Tensor) -> int:
    """Words of `tensor`: its bytes divided by four, rounded up."""
    return -(-tensor.numel() * tensor.element_size() // WORD_BYTES)


def bit_hash(tensor: torch.Tensor, *, offset: int = 0) -> torch.Tensor:
    """Exact hash of the bits of `tensor`, elements taken in row-major order whatever the strides.

    Args:
        tensor: dense, any shape, any dtype of whole bytes.
        offset: position of the first word in what is being hashed, in words of four bytes, at least 0.

    Returns:
        int64 scalar on the tensor's device. The hash of a whole is the sum modulo 2^64 (what `+` of int64 tensors
        does) of the hashes of its parts, each with its offset, if every part but the last is a whole number of words.

    Raises:
        ValueError: a sparse or quantised tensor, or a negative offset.

    Shape, dtype and length are not part of the hash, and trailing zeros do not change it.
    """
    if offset < 0:
        raise ValueError(f"offset = {offset}: must be at least 0")
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise ValueError(f"a tensor of layout {tensor.layout} and dtype {tensor.dtype} has no plain bits to hash")
    tensor = tensor.detach()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    tensor = tensor.resolve_neg()
    if _compiled is not None and tensor.is_cpu and tensor.is_contiguous():
        return _hash_memory(tensor, offset)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    step = (_CHUNK_WORDS_CUDA if tensor.is_cuda else _CHUNK_WORDS) * WORD_BYTES // tensor.element_size()
    for start in range(0, tensor.numel(), step):
        for words in _words(_elements(tensor, start, min(start + step, tensor.numel()))):
            total += _hash_words(words, offset)
            offset += words.numel()
    return total


def _elements(tensor: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Elements start … stop − 1 in row-major order, (stop − start,); a view where the memory allows one."""
    if tensor.is_contiguous():
        return tensor.view(-1)[start:stop]
    if tensor.dim() == 1:
        return tensor[start:stop].contiguous()
    width = tensor[0].numel()
    first, last = start // width, (stop - 1) // width
    if first == last:
        return _elements(tensor[first], start - first * width, stop - first * width)
    middle = tensor[first + 1 : last].reshape(-1)
    head = _elements(tensor[first], start - first * width, width)
    return torch.cat([head, middle, _elements(tensor[last], 0, stop - last * width)])


def _words(elements: torch.Tensor) -> list[torch.Tensor]:
    """Words of contiguous elements, int32; if the last one has to be filled up, it comes by itself."""
    memory = elements.view(torch.uint8)
    num_whole = memory.numel() // WORD_BYTES * WORD_BYTES
    whole, rest = memory[:num_whole], memory[num_whole:]
    if whole.storage_offset() % WORD_BYTES:
        whole = whole.clone()
    words = [whole.view(torch.int32)] if num_whole else []
    if rest.numel():
        last = torch.zeros(WORD_BYTES, dtype=torch.uint8, device=elements.device)
        last[: rest.numel()] = rest
        words.append(last.view(torch.int32))
    return words


def _hash_words(words: torch.Tensor, offset: int) -> torch.Tensor:
    """Hash of int32 words, contiguous, as an int64 scalar."""
    if _compiled is not None and words.is_cpu:
        return _hash_memory(words, offset)
    hashed: torch.Tensor | None = launch("hash.kernel", words, lambda kernels: kernels.hash_words(words, offset))
    if hashed is not None:
        return hashed
    values = words.long().bitwise_and_(0xFFFFFFFF)
    return values.mul_(_weights(offset, words.numel(), words.device)).sum()


def _hash_memory(tensor: torch.Tensor, offset: int) -> torch.Tensor:
    """Hash of a contiguous tensor on the CPU by the compiled kernel, as an int64 scalar."""
    assert _compiled is not None
    num_bytes = tensor.numel() * tensor.element_size()
    threads = torch.get_num_threads()
    return torch.tensor(_compiled.hash(tensor.data_ptr(), num_bytes, offset, gomp_parallel(), threads), device="cpu")


def _weights(start: int, count: int, device: torch.device) -> torch.Tensor:
    """K of the positions start … start + count − 1, (count,), int64; products wrap, as the definition wants."""
    position = torch.arange(start, start + count, dtype=torch.int64, device=device)
    high = position >> 31
    mixed = position.bitwise_and_(_MASK).int()
    mixed ^= mixed >> 16
    mixed.mul_(_FIRST).bitwise_and_(_MASK)
    mixed ^= mixed >> 15
    mixed.mul_(_SECOND).bitwise_and_(_MASK)
    mixed ^= mixed >> 16
    upper = (mixed * _THIRD).bitwise_and_(_MASK)
    upper ^= upper >> 14
    if start + count > _MASK:
        upper ^= (high * _FOURTH).bitwise_and_(_MASK).int()
    upper.mul_(_FOURTH).bitwise_and_(_MASK)
    return ((upper.long() << 33) + (mixed.long() << 2)).add_(1)
