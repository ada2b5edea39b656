"""Operators that multiply matrices and that no check understands: they run as they are, and are counted by name.

Only kernels that do the arithmetic themselves are listed. An operator that calls a protected one inside (`addbmm`,
`_grouped_mm` on a CPU, `linear`, `matmul`, `_scaled_dot_product_attention_math`) must not be: its inner products arrive
at the seam by themselves, but not from within a handler. Meta tensors hold no numbers. Tensors in mkldnn's own layout
and operators of other libraries (`mkldnn::`, `quantized::`, custom ones) do not arrive here; `coverage.py` says so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from resilience.abft.seam import Handler, Original, Seam

__all__ = ["UNPROTECTED", "add_counters"]

_VECTOR = "matrix–vector product"
_INTEGER = "integer or quantised product"
_CONVOLUTION = "convolution"
_FUSED = "fused with other work"
_SPARSE = "sparse product"

UNPROTECTED: dict[str, str] = {
    "addmv": _VECTOR,
    "addmv.out": _VECTOR,
    "addmv_": _VECTOR,
    "dot": _VECTOR,
    "vdot": _VECTOR,
    "_int_mm": _INTEGER,
    "_int_mm.out": _INTEGER,
    "_scaled_mm": _INTEGER,
    "_scaled_mm.out": _INTEGER,
    "_weight_int8pack_mm": _INTEGER,
    "_weight_int4pack_mm": _INTEGER,
    "_weight_int4pack_mm_for_cpu": _INTEGER,
    "_dyn_quant_matmul_4bit": _INTEGER,
    "_addmm_activation": _FUSED,
    "_addmm_activation.out": _FUSED,
    "mkldnn_rnn_layer": _FUSED,
    "mkldnn_rnn_layer_backward": _FUSED,
    "_cudnn_rnn": _FUSED,
    "_cudnn_rnn_backward": _FUSED,
    "convolution": _CONVOLUTION,
    "convolution_backward": _CONVOLUTION,
}
"""Operator of aten, with overload, to why it is not checked."""

_TWO_DTYPES = "product of one dtype with a result of another"
_VARLEN = "fused attention called past scaled_dot_product_attention"
_ON_CUDA = {
    **dict.fromkeys(
        (f"{name}.{form}" for name in ("mm", "addmm", "bmm", "baddbmm") for form in ("dtype", "dtype_out")), _TWO_DTYPES
    ),
    "_grouped_mm": "grouped product",
    "_scaled_grouped_mm": "grouped product",
    "_scaled_grouped_mm_v2": "grouped product",
    "_scaled_mm_v2": _INTEGER,
    "_scaled_mm_v2.out": _INTEGER,
    "_mixed_dtypes_linear": _INTEGER,
    "_cslt_sparse_mm": _SPARSE,
    "_sparse_semi_structured_mm": _SPARSE,
    "_sparse_semi_structured_addmm": _SPARSE,
    "_sparse_semi_structured_linear": _SPARSE,
    "_flash_attention_forward": _VARLEN,
    "_flash_attention_backward": _VARLEN,
    "_efficient_attention_forward": _VARLEN,
    "_efficient_attention_backward": _VARLEN,
    "_cudnn_attention_forward": _VARLEN,
    "_cudnn_attention_backward": _VARLEN,
}
"""What a CPU does not have, or does by operators that are protected; where the others call these, they are not counted
again.
"""

_OTHER_LAYOUTS = {
    "mm": _SPARSE,
    "mm.out": _SPARSE,
    "addmm": _SPARSE,
    "addmm.out": _SPARSE,
    "addmm_": _SPARSE,
    "bmm": _SPARSE,
    "mv": _SPARSE,
    "addmv.out": _SPARSE,
    "_sparse_sparse_matmul": _SPARSE,
    "hspmm": _SPARSE,
    "sparse_sampled_addmm": _SPARSE,
}


def add_counters(seam: Seam, count: Callable[[str], None]) -> None:
    """Put a counter in front of every operator here; `count(reason)` is called once a call, before it runs."""
    for operator, reason in UNPROTECTED.items():
        seam.add(operator, _counter(reason, count), inherited=True)
    for operator, reason in _ON_CUDA.items():
        seam.add(operator, _counter(reason, count), keys=("CUDA",))
    for operator, reason in _OTHER_LAYOUTS.items():
        seam.add(operator, _counter(reason, count), keys=("SparseCPU", "SparseCsrCPU", "SparseCUDA", "SparseCsrCUDA"))


def _counter(reason: str, count: Callable[[str], None]) -> Handler:
    def handle(original: Original, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        count(reason)
        return original(*args, **kwargs)

    return handle
