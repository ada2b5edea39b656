"""Compiles the attention kernels ahead of time as `api.py` would launch them. Asserts nothing."""

from __future__ import annotations

from typing import Any

from resilience.kernels.attention import backward, forward, summary
from resilience.kernels.attention.tiling import padded, tiling_for
from tests.kernels.aot import Usage, compile_for

_FLOATS = {"scale", "scale_log2", "tolerance_scale"}
_STATISTICS = {
    "lse", "delta", "k_sums", "v_sums", "q_sums", "do_sums", "k_norms", "v_norms", "q_norms", "do_norms", "v_norm_max",
}  # fmt: skip
_WORDS = {"cu_q", "cu_k", "status", "ring", "cursor", "strikes"}
_OPERANDS = {"q", "k", "v", "o", "d_o", "dq", "dk", "dv", "k_columns", "v_columns", "q_columns", "do_columns"}

KERNELS = {
    "forward": forward.attention_forward_kernel,
    "dq": backward.attention_dq_kernel,
    "dkdv": backward.attention_dkdv_kernel,
    "summarise_keys": summary.summarise_keys,
    "summarise_queries": summary.summarise_queries,
}


def compile_attention(
    target: str,
    name: str,
    head_dim: int,
    *,
    checked: bool = True,
    inner: bool = True,
    causal: bool = True,
    packed: bool = False,
    inject: int = 0,
    dtype: str = "bf16",
    launch: Any = None,
) -> Usage:
    """Compile one of `KERNELS` for a target of `aot.TARGETS` under the tiling that `api.py` would choose."""
    kernel = KERNELS[name]
    backend, capability = ("hip", 0) if target.startswith("gfx") else ("cuda", int(target[3:]))
    tiling = tiling_for(head_dim, backend, capability)
    launch = launch or {"forward": tiling.forward, "dq": tiling.dq, "dkdv": tiling.dkdv}.get(name, tiling.forward)
    constants = {
        "D": head_dim,
        "D_PAD": padded(head_dim),
        "BLOCK_M": launch.block_m,
        "BLOCK_N": launch.block_n,
        "BLOCK": launch.block_n,
        "NUM_COLUMNS": tiling.num_columns,
        "CAUSAL": causal,
        "VARLEN": packed,
        "CHECKED": checked,
        "INNER": inner,
        "INJECT": inject,
        "SM_KNOWN": backend == "cuda",
    }
    constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
    signature = {argument: _type_of(argument, dtype) for argument in kernel.arg_names if argument not in constants}
    unaligned = frozenset(
        argument for argument, kind in signature.items() if kind == "i32" and not argument.startswith("stride")
    )
    is_summary = name.startswith("summarise")
    return compile_for(
        target, kernel, signature, constants, unaligned=unaligned,
        num_warps=4 if is_summary else launch.num_warps, num_stages=2 if is_summary else launch.num_stages,
    )  # fmt: skip


def _type_of(argument: str, dtype: str) -> str:
    if argument in _OPERANDS:
        return f"*{dtype}"
    if argument in _STATISTICS:
        return "*fp32"
    if argument in _WORDS:
        return "*i32"
    return "fp32" if argument in _FLOATS else "i32"
