"""Weighted sums of matrices, and those of a GEMM's right operand, kept where it is a parameter. No verdicts.

Shapes: (m, n), or b of them; c checksum vectors. All sums are float32, or float64 for float64 matrices.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from resilience.kernels.sweep import Sweep, sweep

__all__ = ["OperandSums", "WeightSums", "addend_sums", "beside", "is_parameter", "sums_of", "vectors"]

_GOLDEN = (5.0**0.5 - 1.0) / 2.0
"""Multiples of it, modulo 1, are spread evenly and never repeat."""

_SIGN_BITS = (13, 19, 23, 28)
"""Of a hash of the position."""


def vectors(n: int, matrix: torch.Tensor) -> torch.Tensor:
    """V, (n, c), each vector contiguous: plain and position-weighted sums, each with fixed pseudo-random signs.

    For matrices of the dtype and on the device of `matrix`: one of each for float32 and float64, two of each for the
    16-bit dtypes, whose round-off is large enough to drown an estimate of a row's energy by two sums only. Two elements
    that swap places differ in sign or in weight in at least one of the sums.
    """
    wide = torch.float64 if matrix.dtype == torch.float64 else torch.float32
    return _vectors(n, 1 if matrix.dtype in (torch.float32, torch.float64) else 2, wide, matrix.device)


@functools.lru_cache(maxsize=256)
def _vectors(n: int, num_of_each: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    position = torch.arange(n, dtype=torch.int64, device="cpu")
    mixed = (position * 0x9E3779B1) & 0xFFFFFFFF
    mixed = ((mixed ^ (mixed >> 15)) * 0x85EBCA77) & 0xFFFFFFFF
    signs = [((mixed >> bit) & 1).double() * 2.0 - 1.0 for bit in _SIGN_BITS[: 2 * num_of_each]]
    weights = 1.0 + position.double() * _GOLDEN % 1.0
    plain, weighted = signs[:num_of_each], [sign * weights for sign in signs[num_of_each:]]
    return torch.stack([*plain, *weighted]).to(device=device, dtype=dtype).mT


def sums_of(
    matrix: torch.Tensor,
    *,
    right: torch.Tensor | None = None,
    left: torch.Tensor | None = None,
    into: Sweep | None = None,
) -> Sweep:
    """matrix·right and matrixᵀ·left in one pass; `matrix` of any floating dtype that is checked. `into`: an earlier
    result for the same shapes, whose memory may be used again.
    """
    dtype = matrix.dtype
    if dtype is torch.float64:
        rows = None if right is None else matrix @ right
        return Sweep(rows, None if left is None else matrix.mT @ left)
    # The compiled kernel does not read float16; the one on a GPU does.
    widened = matrix.float() if dtype is torch.float16 and matrix.is_cpu else matrix
    return sweep(widened, right, left, into=into)


def beside(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Vectors of `one` and of `other` in one set, each still contiguous: (…, n, c) and (n, c) to (…, n, 2·c)."""
    one, other = one.mT, other.mT
    return torch.cat([one, other.expand(*one.shape[:-2], *other.shape[-2:])], dim=-2).mT


class OperandSums(NamedTuple):
    """What the checks of C = A·B and of its gradients need of B, (k, n) or (b, k, n)."""

    right: torch.Tensor
    """B·V, (k, c): multiplied by A it gives the row sums of C."""
    left: torch.Tensor | None
    """Bᵀ·U, (n, c), U the vectors of length k: multiplied by dC it gives the row sums of dA = dC·Bᵀ."""
    both: torch.Tensor | None
    """B·V beside U, (k, 2·c)."""


class WeightSums:
    """Sums of right operands; those of module parameters are taken once per optimizer step.

    The key is the parameter's identity, memory and version counter, never a reference to it: a gathered ZeRO-3
    parameter is not kept alive. A stale entry cannot hide a fault: it makes the screen raise a false alarm, which the
    confirmation (it reads the parameter itself) dismisses, and the entry is dropped.
    """

    def __init__(self) -> None:
        self._operands: dict[tuple[object, ...], OperandSums] = {}
        self._addends: dict[tuple[object, ...], torch.Tensor] = {}
        self._last: dict[tuple[object, ...], OperandSums] = {}
        """Of the last step, by the place of the operand: their memory serves again."""

    def clear(self) -> None:
        """Forget everything: a step begins, and no graph of an earlier one asks for its sums any more."""
        self._last = {
            _place(key): sums for key, sums in self._operands.items() if sums.both is not None and sums.both.dim() == 2
        }
        self._operands.clear()
        self._addends.clear()

    def discard(self, operand: torch.Tensor) -> None:
        """Forget the sums of `operand`."""
        key = _key(operand)
        self._operands.pop(key, None)
        self._addends.pop(key, None)

    def of_right(self, right: torch.Tensor, *, carried: bool = False) -> OperandSums:
        """Sums of a right operand; all of them where they are to be `carried` to the gradients."""
        if not is_parameter(right):
            return _operand_sums(right, carried=carried)
        key = _key(right)
        known = self._operands.get(key)
        if known is None or (carried and known.both is None):
            last = self._last.pop(_place(key), None) if carried else None
            known = self._operands[key] = _operand_sums(right, carried=carried, last=last)
        return known

    def of_addend(self, addend: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """D·V, with D expanded to the width of `out`."""
        if not is_parameter(addend) or addend.shape[-1:] != out.shape[-1:]:
            return addend_sums(addend, out)
        key = _key(addend)
        known = self._addends.get(key)
        if known is None:
            known = self._addends[key] = addend_sums(addend, out)
        return known


def _operand_sums(right: torch.Tensor, *, carried: bool, last: OperandSums | None = None) -> OperandSums:
    k, n = right.shape[-2:]
    if not carried:
        rows = sums_of(right, right=vectors(n, right)).rows
        assert rows is not None
        return OperandSums(rows, None, None)
    of_rows = vectors(k, right)
    into = None if last is None else Sweep(last.right, last.left)
    rows, columns = sums_of(right, right=vectors(n, right), left=of_rows, into=into)
    assert rows is not None
    if last is not None and rows is last.right:
        return last
    both = beside(rows, of_rows)
    # Of a single matrix the sums are a part of `both`: in the next step they are written where they stand.
    return OperandSums(both[:, : rows.shape[-1]] if rows.dim() == 2 else rows, columns, both)


def addend_sums(addend: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """D·V, with D expanded to the width of `out`."""
    matrix = addend.expand(*addend.shape[:-2], addend.shape[-2] if addend.dim() > 1 else 1, out.shape[-1])
    rows = sums_of(matrix, right=vectors(out.shape[-1], out)).rows
    assert rows is not None
    return rows


def is_parameter(operand: torch.Tensor) -> bool:
    """Whether `operand` is a parameter of a module, or a view of one."""
    base = operand._base
    return isinstance(operand if base is None else base, torch.nn.Parameter)


def _place(key: tuple[object, ...]) -> tuple[object, ...]:
    """A key without the version of its operand."""
    return key[0], *key[2:]


def _key(operand: torch.Tensor) -> tuple[object, ...]:
    # ZeRO-3 gathers one parameter after the other into the same memory, so the address alone tells too little.
    parameter = operand if operand._base is None else operand._base
    version = None if operand.is_inference() else operand._version
    return id(parameter), version, operand.data_ptr(), operand.shape, operand.stride()
