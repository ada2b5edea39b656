"""How precise the user lets products of float32 be, per device. Nothing is set here."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["float32_precision"]

_CPU: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # a module that makes its attributes
_CUDA: Any = torch.backends.cuda.matmul


def float32_precision(device_type: str) -> str:
    """`ieee`, `tf32` or `bf16`: what operands of a float32 product may be rounded to on a device of this type.

    The back-ends are asked, whichever way it was set: `torch.get_float32_matmul_precision` raises where they differ.
    """
    precision: str = (_CUDA if device_type == "cuda" else _CPU).fp32_precision
    return "ieee" if precision == "none" else precision
