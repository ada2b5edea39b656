"""How precise the user lets products of float32 be, per device. Nothing is set here."""

from __future__ import annotations

import torch

__all__ = ["float32_precision"]

_precision_of = torch._C._get_fp32_precision_getter
"""What `torch.backends.….matmul.fp32_precision` calls; that way costs five times as much, around every product."""


def float32_precision(device_type: str) -> str:
    """`ieee`, `tf32` or `bf16`: what operands of a float32 product may be rounded to on a device of this type.

    The back-ends are asked, whichever way it was set: `torch.get_float32_matmul_precision` raises where they differ.
    """
    precision: str = _precision_of("cuda" if device_type == "cuda" else "mkldnn", "matmul")
    return "ieee" if precision == "none" else precision
