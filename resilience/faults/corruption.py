"""What each kind of tensor fault does to elements: pure functions of values, and which elements they are applied to.

Shapes: `values` is 1-D, the struck elements in row-major order, of a floating dtype; the result has the same shape and
dtype. Elements are addressed by their place in row-major order, whatever the tensor's strides are.
"""

from __future__ import annotations

import random

import torch

from resilience.errors import FaultPlanError
from resilience.faults.plan import Fault

__all__ = ["bits_of", "corrupted", "flip_bits", "positions"]

WARP_WIDTH = 32
"""Elements between two struck ones of kind `stride`: lanes of a warp, as seen in the field (arXiv 2605.04213)."""

STRIDE_COUNT = 8
"""Elements that `stride` strikes where the plan names no count."""

NEAR_INF_SHARE = 0.9

_INTEGER_OF = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}


def bits_of(values: torch.Tensor) -> torch.Tensor:
    """The same bits as integers (a view).

    Raises:
        FaultPlanError: the dtype is none that faults are defined for.
    """
    integer = _INTEGER_OF.get(values.dtype)
    if integer is None:
        raise FaultPlanError(f"a fault cannot strike a tensor of {values.dtype}; it must be fp16, bf16, fp32 or fp64")
    return values.view(integer)


def flip_bits(values: torch.Tensor, bits: tuple[int, ...]) -> torch.Tensor:
    """A copy of `values` in which these bits of every element are flipped; bit 0 is the lowest of the mantissa.

    Raises:
        FaultPlanError: the dtype has no such bit.
    """
    width = values.element_size() * 8
    missing = [bit for bit in bits if not 0 <= bit < width]
    if missing:
        raise FaultPlanError(f"bit {missing[0]} does not exist in {values.dtype}; it has bits 0 to {width - 1}")
    mask = sum(1 << bit for bit in bits)
    signed = mask - (1 << width) if mask >= 1 << (width - 1) else mask
    return (bits_of(values) ^ signed).view(values.dtype)


def corrupted(values: torch.Tensor, fault: Fault) -> torch.Tensor:
    """A corrupted copy of `values` (1-D).

    Raises:
        FaultPlanError: the fault does not fit the dtype.
    """
    match fault.kind:
        case "inf":
            return torch.full_like(values, float("inf"))
        case "nan":
            return torch.full_like(values, float("nan"))
        case "near_inf":
            return torch.full_like(values, NEAR_INF_SHARE * torch.finfo(values.dtype).max)
        case "zero":
            return torch.zeros_like(values)
        case "bitflip":
            assert fault.bit is not None
            return flip_bits(values, (fault.bit,))
        case "multibit":
            assert fault.bits is not None
            return flip_bits(values, fault.bits)
        case "stride":
            return values.roll(-1)
        case "scale":
            assert fault.factor is not None
            # In double precision, so that the factor itself is not rounded to the tensor's dtype.
            return (values.double() * fault.factor).to(values.dtype)
    raise AssertionError(f"kind {fault.kind!r} passed the plan's checks but has no arithmetic")


def positions(fault: Fault, num_elements: int, draw: random.Random) -> range:
    """Which elements the fault strikes, as places in row-major order.

    Args:
        fault: says where, or leaves it open.
        num_elements: of the tensor; at least 1.
        draw: gives the first element where the fault names none.

    Raises:
        FaultPlanError: the tensor has no such elements.
    """
    if fault.site == "gradient" and fault.index is None and fault.count is None and fault.kind != "stride":
        return range(num_elements)
    pitch = WARP_WIDTH if fault.kind == "stride" else 1
    count = fault.count
    if count is None:
        fitting = -(-(num_elements - (fault.index or 0)) // pitch)
        count = max(2, min(STRIDE_COUNT, fitting)) if fault.kind == "stride" else 1
    last_start = num_elements - 1 - (count - 1) * pitch
    if last_start < (fault.index or 0):
        wanted = f"{count} element{'s' if count > 1 else ''} from index {fault.index or 0}, {pitch} apart"
        raise FaultPlanError(f"site {fault.site!r}: {wanted}, do not fit a tensor of {num_elements} elements")
    start = fault.index if fault.index is not None else draw.randint(0, last_start)
    return range(start, start + (count - 1) * pitch + 1, pitch)
