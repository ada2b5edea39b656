"""One matrix product as the checks see it, whichever operator it came through. No arithmetic here."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

__all__ = ["GEMM_OPERATORS", "Gemm", "parse_gemm", "unchecked_reason"]

GEMM_OPERATORS = (
    "mm",
    "mm.out",
    "addmm",
    "addmm.out",
    "addmm_",
    "bmm",
    "bmm.out",
    "baddbmm",
    "baddbmm.out",
    "baddbmm_",
)
"""The operators of aten that every GEMM of matmul, linear, einsum, Conv1D and MultiheadAttention arrives at."""

_CHECKED_DTYPES = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})


@dataclasses.dataclass(frozen=True, slots=True)
class Gemm:
    """C = alpha·left·right + beta·addend; (m, k) by (k, n), or with a batch dimension in front of both."""

    left: torch.Tensor
    right: torch.Tensor
    addend: torch.Tensor | None = None
    """Broadcastable to C; for an operator in place a copy of what C held before."""
    beta: float = 1.0
    alpha: float = 1.0
    overwritten: torch.Tensor | None = None
    """The addend itself, where the call writes its result over it: `addend` must be put back before the call is
    repeated.
    """
    repeatable: bool = True
    """Whether the same call can be made again: what it reads can be had as it was. Else `addend` is still a copy of
    what the call read, and the result can be rebuilt from checksums."""

    @property
    def m(self) -> int:
        return int(self.left.shape[-2])

    @property
    def k(self) -> int:
        return int(self.left.shape[-1])

    @property
    def n(self) -> int:
        return int(self.right.shape[-1])


def parse_gemm(operator: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Gemm | None:
    """What a call of one of `GEMM_OPERATORS` computes; None where it has nothing that could be checked.

    An addend that the call overwrites is copied first. Integer and complex products, and empty ones, are not checked;
    nor is a product written over its own operands, whose result is undefined: here it was wrong by orders of magnitude
    for some shapes and dtypes.
    """
    left, right = _operands(operator, args)
    if left.dtype not in _CHECKED_DTYPES or left.numel() == 0 or right.numel() == 0:
        return None
    if left.dim() != right.dim() or left.dim() < 2:
        return None  # the operator itself will say what is wrong
    base, _, form = operator.partition(".")
    with_addend = _has_addend(base)
    target = args[0] if base.endswith("_") else kwargs.get("out") if form == "out" else None
    if target is not None and (_overlap(target, left) or _overlap(target, right)):
        return None
    if not with_addend:
        return Gemm(left, right)
    beta, alpha = kwargs.get("beta", 1), kwargs.get("alpha", 1)
    if isinstance(beta, complex) or isinstance(alpha, complex):
        return None
    addend, beta, alpha = args[0], float(beta), float(alpha)
    if beta == 0.0:
        return Gemm(left, right, None, beta, alpha)
    if target is None or not _overlap(target, addend):
        return Gemm(left, right, addend, beta, alpha)
    same = (
        target.data_ptr() == addend.data_ptr() and target.shape == addend.shape and target.stride() == addend.stride()
    )
    return Gemm(left, right, addend.clone(), beta, alpha, overwritten=addend if same else None, repeatable=same)


def unchecked_reason(operator: str, args: tuple[Any, ...]) -> str:
    """Why `parse_gemm` returned None."""
    left, right = _operands(operator, args)
    if left.dtype.is_complex:
        return "complex product"
    if left.dtype not in _CHECKED_DTYPES:
        return f"product of {left.dtype}"
    if left.numel() == 0 or right.numel() == 0:
        return "empty product"
    if left.dim() == right.dim() >= 2:
        return "product written over its own operand"
    return "operands that do not fit"


def _operands(operator: str, args: tuple[Any, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    left, right = args[1:3] if _has_addend(operator) else args[0:2]
    return left, right


def _has_addend(operator: str) -> bool:
    return operator.startswith(("addmm", "baddbmm"))


def _overlap(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether the spans of memory of two tensors meet."""
    (first, end), (other_first, other_end) = _span(one), _span(other)
    return one.device == other.device and first < other_end and other_first < end


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    if tensor.numel() == 0:
        return 0, 0
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (reach + 1) * tensor.element_size()
