"""Parity: every pattern of losses is made up for, as plain Python arithmetic says."""

from __future__ import annotations

import itertools
import random

import pytest

from resilience.snapshot.groups import MAX_MEMBERS
from resilience.snapshot.parity import Code, naive_parity

CODES = [(1, 1), (2, 1), (7, 1), (1, 2), (4, 2), (6, 2), (3, 3), (5, 3)]


def blocks_of(num: int, length: int, seed: int = 0) -> list[bytes]:
    source = random.Random(seed)
    return [source.randbytes(length) for _ in range(num)]


@pytest.mark.parametrize(("num_data", "losses"), CODES)
@pytest.mark.parametrize("length", [1, 7, 64, 1001])
def test_any_losses_up_to_m_are_made_up_for(num_data: int, losses: int, length: int) -> None:
    code, data = Code(num_data, losses), blocks_of(num_data, length)
    stripe = [*data, *code.encode(data)]
    assert all(len(block) == length for block in stripe)
    for num_lost in range(1, losses + 1):
        for lost in itertools.combinations(range(num_data + losses), num_lost):
            left = {index: block for index, block in enumerate(stripe) if index not in lost}
            for index in lost:
                assert code.rebuild(left, index) == stripe[index], lost


@pytest.mark.parametrize(("num_data", "losses"), [code for code in CODES if code[1] > 1])
def test_parity_equals_the_oracle(num_data: int, losses: int) -> None:
    data = blocks_of(num_data, 193, seed=1)
    assert Code(num_data, losses).encode(data) == naive_parity(data, losses)


def test_parity_of_one_loss_is_xor() -> None:
    data = blocks_of(3, 65, seed=2)
    assert Code(3, 1).encode(data) == [bytes(a ^ b ^ c for a, b, c in zip(*data, strict=True))]


def test_a_damaged_block_is_made_up_for_once_it_is_left_out() -> None:
    code, data = Code(4, 2), blocks_of(4, 256, seed=3)
    stripe = [*data, *code.encode(data)]
    damaged = bytearray(stripe[1])
    damaged[17] ^= 4
    left = {index: block for index, block in enumerate(stripe) if index != 0}
    assert code.rebuild({**left, 1: damaged}, 0) != stripe[0]
    del left[1]
    assert code.rebuild(left, 0) == stripe[0]


def test_more_losses_than_parity_are_refused() -> None:
    code, data = Code(4, 2), blocks_of(4, 16)
    with pytest.raises(ValueError, match="3 blocks of a stripe are left; 4 are needed"):
        code.rebuild(dict(enumerate(data[:3])), 3)


def test_blocks_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="one length"):
        Code(2, 1).encode([b"12", b"1"])


@pytest.mark.parametrize(("num_data", "losses"), [(0, 1), (1, 0), (MAX_MEMBERS, 1)])
def test_codes_that_do_not_exist_are_refused(num_data: int, losses: int) -> None:
    with pytest.raises(ValueError, match="parity over"):
        Code(num_data, losses)


@pytest.mark.parametrize("losses", [1, 2])
def test_empty_blocks(losses: int) -> None:
    code = Code(2, losses)
    assert code.encode([b"", b""]) == [b""] * losses
    assert code.rebuild({0: b"", 2: b""}, 1) == b""
