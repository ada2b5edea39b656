"""How precise the arithmetic of products is, as the user lets PyTorch do it: settings in, unit round-offs out.

Here is what the bounds of `thresholds` need of a dtype and a device. Never here: a bound, or a setting that is made.
"""

from __future__ import annotations

import functools

import torch

from resilience.abft.thresholds import Precision
from resilience.kernels.precision import float32_precision

__all__ = ["matmul_precision", "operand_roundoff", "precision_of"]


def matmul_precision(matrix: torch.Tensor) -> str:
    """How products of the dtype and on the device of `matrix` are computed.

    `ieee`, `tf32` or `bf16`: see `float32_precision`. Of 16 bits on a GPU: `split` where the parts of a sum may be
    rounded to them before they are added (torch's default), `fp16` where all of it may be accumulated in float16.
    """
    if matrix.is_cpu:
        return float32_precision("cpu") if matrix.dtype == torch.float32 else "ieee"
    if matrix.dtype == torch.float32:
        return float32_precision(matrix.device.type)
    if not matrix.is_cuda or matrix.dtype == torch.float64:
        return "ieee"
    settings = torch.backends.cuda.matmul
    if matrix.dtype == torch.bfloat16:
        return "split" if settings.allow_bf16_reduced_precision_reduction else "ieee"
    if settings.allow_fp16_accumulation:
        return "fp16"
    return "split" if settings.allow_fp16_reduced_precision_reduction else "ieee"


@functools.cache
def precision_of(stored: torch.dtype, matmul: str, checked: torch.dtype | None = None) -> Precision:
    """Unit round-offs of a product.

    Args:
        stored: dtype of the result.
        matmul: how it is computed, see `matmul_precision`.
        checked: dtype of its row sums; float64 for float64, float32 for every other by default.
    """
    wide = torch.float64 if stored == torch.float64 else torch.float32
    grain = torch.finfo(stored).eps / 2
    return Precision(
        stored=grain,
        accumulated=torch.finfo(torch.float16 if matmul == "fp16" else wide).eps / 2,
        checked=torch.finfo(checked or wide).eps / 2,
        operand=operand_roundoff(matmul),
        split=4.0 * grain if matmul in ("split", "fp16") else 0.0,
    )


def operand_roundoff(matmul: str) -> float:
    """Unit round-off of operands on their way into products that are computed as `matmul_precision` says."""
    return {"tf32": 2.0**-11, "bf16": 2.0**-8}.get(matmul, 0.0)
