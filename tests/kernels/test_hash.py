"""The hash of a tensor's bits: equal to its definition, and what the definition promises to see."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resilience.kernels.hash import oracle
from resilience.kernels.hashing import WORD_BYTES, bit_hash, num_words

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.bool, torch.complex64)
POSITIONS = st.integers(0, (1 << 31) - 1)
BITS = st.integers(0, 31)


def number(value: torch.Tensor) -> int:
    assert value.dtype == torch.int64
    assert value.shape == ()
    return int(value) % (1 << 64)


def memory(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())


def noise(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.rand(shape, generator=generator) < 0.5
    words = torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8, generator=generator)
    return words.reshape(-1).view(dtype).reshape(shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [0, 1, 2, 3, 7, 1001])
@pytest.mark.parametrize("offset", [0, 5, (1 << 31) - 4, 1 << 40])
def test_it_is_its_definition(dtype: torch.dtype, length: int, offset: int) -> None:
    tensor = noise((length,), dtype)
    assert number(bit_hash(tensor, offset=offset)) == oracle.bit_hash(memory(tensor), offset=offset)
    assert num_words(tensor) == -(-len(memory(tensor)) // WORD_BYTES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_it_does_not_depend_on_strides_and_chunks(dtype: torch.dtype) -> None:
    whole = noise((3, 130, 701), dtype)  # more than one chunk, odd everywhere
    expected = number(bit_hash(whole))
    generator = random.Random(0)
    for _ in range(5):
        order = generator.sample(range(3), 3)
        moved = whole.permute(order).contiguous().permute([order.index(axis) for axis in range(3)])
        assert memory(moved) == memory(whole)
        assert number(bit_hash(moved)) == expected
    padded = torch.zeros(3, 131, 703, dtype=dtype)
    padded[:, 1:, 1:702] = whole
    assert number(bit_hash(padded[:, 1:, 1:702])) == expected
    shifted = torch.cat([whole.new_zeros(1), whole.reshape(-1)])[1:]  # not aligned to a word
    assert number(bit_hash(shifted)) == expected


def test_expanded_scalar_and_conjugate_tensors_have_the_bits_that_they_show() -> None:
    row = noise((5,), torch.float32)
    assert number(bit_hash(row.expand(4, 5))) == number(bit_hash(row.repeat(4, 1)))
    assert number(bit_hash(row[2])) == number(bit_hash(row[2:3]))
    pair = torch.view_as_complex(torch.randn(6, 2, generator=torch.Generator().manual_seed(0)))
    assert number(bit_hash(pair.conj())) == number(bit_hash(pair.conj().resolve_conj())) != number(bit_hash(pair))
    assert number(bit_hash(pair.conj().imag)) == number(bit_hash(-pair.imag.contiguous()))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 400), st.lists(st.integers(0, 400), max_size=4), POSITIONS, st.sampled_from(DTYPES[:4]))
def test_parts_add_up(length: int, cuts: list[int], offset: int, dtype: torch.dtype) -> None:
    tensor = noise((length,), dtype, seed=length)
    step = max(1, WORD_BYTES // dtype.itemsize)
    edges = sorted({0, length, *(min(cut // step * step, length) for cut in cuts)})
    parts = [
        bit_hash(tensor[start:stop], offset=offset + start * dtype.itemsize // WORD_BYTES)
        for start, stop in itertools.pairwise(edges)
    ]
    assert number(torch.stack(parts).sum()) == number(bit_hash(tensor, offset=offset))


@settings(max_examples=200, deadline=None)
@given(POSITIONS, st.integers(1, (1 << 32) - 1))
def test_any_change_of_a_word_is_seen(position: int, change: int) -> None:
    assert change * oracle.weight(position) % (1 << 64) != 0


@settings(max_examples=300, deadline=None)
@given(POSITIONS, POSITIONS, BITS, BITS, st.sampled_from([1, -1]))
def test_any_two_flipped_bits_are_seen(one: int, other: int, bit: int, other_bit: int, sign: int) -> None:
    if (one, bit) == (other, other_bit):
        return
    change = (oracle.weight(one) << bit) + sign * (oracle.weight(other) << other_bit)
    if one == other and bit == other_bit:
        return
    assert change % (1 << 64) != 0


@settings(max_examples=200, deadline=None)
@given(POSITIONS, st.integers(0, 30), BITS)
def test_neighbours_and_far_apart_positions_differ_enough(position: int, distance_bit: int, bit: int) -> None:
    """The facts (b) and (c) of the proof, at distances of powers of two, where weak weights would repeat themselves."""
    other = (position + (1 << distance_bit)) % (1 << 31)
    difference = oracle.weight(position) - oracle.weight(other)
    assert difference % (1 << 33) != 0
    assert (oracle.weight(position) + oracle.weight(other)) % 4 == 2
    assert (difference << bit) % (1 << 64) != 0


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 300), st.data(), st.sampled_from([torch.float32, torch.bfloat16, torch.int8]))
def test_swapped_elements_are_seen(length: int, data: st.DataObject, dtype: torch.dtype) -> None:
    one, other = (data.draw(st.integers(0, length - 1)) for _ in range(2))
    clean = noise((length,), dtype, seed=length)
    swapped = clean.clone()
    swapped[one], swapped[other] = clean[other], clean[one]
    same = memory(clean) == memory(swapped)
    assert (number(bit_hash(clean)) == number(bit_hash(swapped))) == same


def test_structured_changes_of_many_words_are_seen() -> None:
    """Rectangles of equal flips with signs that cancel in a sum, which weights of product form would miss."""
    clean = torch.zeros(256, 256, dtype=torch.int32)
    seen = {number(bit_hash(clean))}
    generator = random.Random(1)
    for _ in range(150):
        rows, columns = generator.sample(range(256), 2), generator.sample(range(256), 2)
        changed = clean.clone()
        top = 1 << 30
        changed[rows[0], columns[0]] = changed[rows[1], columns[1]] = top
        changed[rows[0], columns[1]] = changed[rows[1], columns[0]] = -top
        seen.add(number(bit_hash(changed)))
    assert len(seen) == 151


def test_what_has_no_plain_bits_is_refused() -> None:
    with pytest.raises(ValueError, match="layout"):
        bit_hash(torch.eye(3).to_sparse())
    with pytest.raises(ValueError, match="offset"):
        bit_hash(torch.ones(3), offset=-1)
