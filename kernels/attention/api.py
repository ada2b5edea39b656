"""Checked flash attention as plain functions: forward, backward, and what they support.

Shapes: dense q, out (b, h, tq, d), k, v (b, hk, tk, d); packed q, out (total_q, h, d), k, v (total_k, hk, d) with
`cu_seqlens` (b + 1) int32 on the device. h is a multiple of hk. lse (b, h, max_q) float32, natural logarithm. A causal
mask is aligned at the top left, as PyTorch's is: query i sees keys 0 … i.

Nothing here waits for the device. A block that fails its checks is run again by a second launch of the same kernel, in
which all other blocks exit at once; what became of it is a record in the `Ring`, which the caller reads when it
synchronises anyway.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
import triton

from .backward import attention_dkdv_kernel, attention_dq_kernel
from .forward import attention_forward_kernel
from .records import FIELDS, NUM_STATUS_WORDS, FaultRecord, Site, parse_records
from .summary import summarise_keys, summarise_queries
from .tiling import Launch, Tiling, padded, tiling_for

__all__ = [
    "Checks", "Forward", "Gradients", "Packed", "Ring", "Strike", "attention_backward", "attention_forward", "supports",
]  # fmt: skip

DEVICE_TYPES = {"cuda"}
"""Where Triton compiles to; tests add the CPU, for its interpreter."""

MAX_HEAD_DIM = 256


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Checks:
    """How the kernels check themselves."""

    max_repairs: int = 2
    """How often a failing block is run again; each costs one launch that is empty when nothing is wrong."""
    tolerance_scale: float = 1.0
    """Factor on every tolerance."""
    inner: bool = True
    """Whether backward also checks what lies between: its S, dP, P and dS, not only the accumulators."""


class Ring:
    """Records of failing blocks, on the device, appended by the kernels under an atomic cursor.

    Between two drains the first `capacity` records are kept: they are nearest to the cause. The others are counted.
    """

    def __init__(self, device: torch.device | str, *, capacity: int = 1024) -> None:
        self.capacity = capacity
        self.records = torch.zeros(capacity, len(FIELDS), dtype=torch.int32, device=device)
        self.cursor = torch.zeros(1, dtype=torch.int32, device=device)

    def drain(self) -> tuple[list[FaultRecord], int]:
        """(records in the order of launches, number that found no room) since the last call; waits for the device."""
        written = int(self.cursor.item())
        if written == 0:
            return [], 0
        kept = min(written, self.capacity)
        rows = self.records[:kept].tolist()
        self.cursor.zero_()
        return parse_records(rows), written - kept


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """Sequences of different lengths, one behind the other."""

    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    max_q: int
    max_k: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Strike:
    """A fault for tests: compiles a variant of the kernel that corrupts one element. Never used otherwise."""

    kernel: str
    """`forward`, `dq` or `dkdv`."""
    site: Site
    block: int
    tile: int
    row: int
    column: int
    kind: int
    """0: set to `bits`; 1: exclusive or with `bits`; 2: multiply by the float32 of `bits`."""
    bits: int
    num_attempts: int = 1
    """Attempts that are struck, from the first one."""


@dataclasses.dataclass(frozen=True, slots=True)
class Forward:
    """Result of the forward pass."""

    out: torch.Tensor
    lse: torch.Tensor
    status: torch.Tensor | None
    """(blocks, 4) int32, see records.py; None without checks."""


@dataclasses.dataclass(frozen=True, slots=True)
class Gradients:
    """Result of the backward pass."""

    dq: torch.Tensor
    dk: torch.Tensor
    dv: torch.Tensor
    dq_status: torch.Tensor | None
    dkdv_status: torch.Tensor | None


def supports(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    dropout: float = 0.0,
    packed: Packed | None = None,
) -> str | None:
    """Why the kernels cannot compute this attention; None if they can. Looks at shapes, dtypes and strides only."""
    tensors = (q, k, v)
    rank = 4 if packed is None else 3
    heads, key_heads = (x.shape[1] if x.dim() > 1 else 0 for x in (q, k))
    reasons = (
        (mask is not None, "an additive mask"),
        (dropout > 0.0, "dropout"),
        (q.dtype not in (torch.float16, torch.bfloat16), f"dtype {q.dtype}"),
        (any(x.dtype != q.dtype or x.device != q.device for x in tensors), "mixed dtypes or devices"),
        (any(x.layout is not torch.strided for x in tensors), "a sparse or nested layout"),
        (q.device.type not in DEVICE_TYPES, f"device {q.device.type}"),
        (any(x.dim() != rank for x in tensors), f"tensors of {q.dim()} dimensions"),
        (key_heads == 0 or heads % max(1, key_heads) != 0, "query heads that are no multiple of key heads"),
        (any(x.numel() == 0 for x in tensors), "an empty tensor"),
        (k.shape[:-1] != v.shape[:-1] or (rank == 4 and q.shape[0] != k.shape[0]), "shapes that do not fit"),
        (not q.shape[-1] == k.shape[-1] == v.shape[-1], "different head dimensions"),
        (q.shape[-1] > MAX_HEAD_DIM or q.shape[-1] % 8 != 0, f"head dimension {q.shape[-1]}"),
        (any(x.stride(-1) != 1 for x in tensors if x.layout is torch.strided), "a strided head dimension"),
        (q.dim() > 1 and q.shape[0] * q.shape[1] > 65535, "more than 65535 pairs of batch and head"),
    )
    return next((reason for found, reason in reasons if found), None)


@dataclasses.dataclass(frozen=True, slots=True)
class _Geometry:
    """Sizes of one call."""

    batch: int
    heads: int
    key_heads: int
    max_q: int
    max_k: int
    head_dim: int
    packed: Packed | None
    tiling: Tiling

    @classmethod
    def of(cls, q: torch.Tensor, k: torch.Tensor, packed: Packed | None, tiling: Tiling | None) -> _Geometry:
        if packed is None:
            batch, max_q, max_k = q.shape[0], q.shape[2], k.shape[2]
        else:
            batch, max_q, max_k = packed.cu_seqlens_q.numel() - 1, packed.max_q, packed.max_k
        tiling = tiling or _tiling_on(q.device, q.shape[-1])
        return cls(batch, q.shape[1], k.shape[1], max_q, max_k, q.shape[-1], packed, tiling)

    @property
    def group(self) -> int:
        return self.heads // self.key_heads

    def strides(self, *tensors: torch.Tensor) -> list[int]:
        """Strides of batch, head and position, tensor after tensor."""
        if self.packed is None:
            return [stride for x in tensors for stride in x.stride()[:3]]
        return [stride for x in tensors for stride in (0, x.stride(1), x.stride(0))]

    def cu_seqlens(self, stand_in: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.packed is None:
            return stand_in, stand_in
        return self.packed.cu_seqlens_q, self.packed.cu_seqlens_k

    def constants(self, launch: Launch) -> dict[str, int | bool]:
        return {
            "D": self.head_dim,
            "D_PAD": padded(self.head_dim),
            "BLOCK_M": launch.block_m,
            "BLOCK_N": launch.block_n,
            "NUM_COLUMNS": self.tiling.num_columns,
            "VARLEN": self.packed is not None,
            "num_warps": launch.num_warps,
            "num_stages": launch.num_stages,
        }


@dataclasses.dataclass(frozen=True, slots=True)
class _Summary:
    """Columns, sums and norms of two operands of equal shape (summary.py)."""

    columns: tuple[torch.Tensor, torch.Tensor]
    sums: tuple[torch.Tensor, torch.Tensor]
    norms: tuple[torch.Tensor, torch.Tensor]
    tiles: int

    @classmethod
    def empty(cls, like: torch.Tensor, pairs: int, length: int, block: int, geometry: _Geometry) -> _Summary:
        tiles = triton.cdiv(length, block)
        columns = like.new_empty(2, pairs, tiles * block, geometry.tiling.num_columns)
        sums = like.new_empty(2, pairs, tiles, padded(geometry.head_dim), dtype=torch.float32)
        norms = like.new_empty(2, pairs, tiles, 2, dtype=torch.float32)
        return cls((columns[0], columns[1]), (sums[0], sums[1]), (norms[0], norms[1]), tiles)


def attention_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    packed: Packed | None = None,
    checks: Checks | None = None,
    ring: Ring | None = None,
    sequence: int = 0,
    layer: int = 0,
    out: torch.Tensor | None = None,
    strikes: Sequence[Strike] = (),
    tiling: Tiling | None = None,
) -> Forward:
    """softmax(scale·q·kᵀ)·v, checked and repaired on the device if `checks` are given (then `ring` is needed).

    Args:
        q: (b, h, tq, d), or (total_q, h, d) when packed; `supports` must have said None.
        k: (b, hk, tk, d), or (total_k, hk, d).
        v: like k.
        causal: query i sees keys 0 … i.
        scale: of the scores; 1 ÷ √d by default.
        packed: where sequences begin and end.
        checks: None compiles the same source without checks, for comparison.
        ring: where failing blocks are recorded.
        sequence: the caller's number of this call, for records.
        layer: of the model, for records.
        out: where to write, of q's shape with any strides whose last is 1; like q by default.
        strikes: for tests; at most one a kernel.
        tiling: instead of the one chosen by hardware and head dimension.
    """
    geometry = _Geometry.of(q, k, packed, tiling)
    launch = geometry.tiling.forward
    pairs = geometry.batch * geometry.heads
    out = torch.empty_like(q) if out is None else out
    lse = torch.empty(geometry.batch, geometry.heads, geometry.max_q, dtype=torch.float32, device=q.device)
    cu_q, cu_k = geometry.cu_seqlens(lse)
    grid = (triton.cdiv(geometry.max_q, launch.block_m), pairs)
    checked = _Checked.of(checks, ring, grid, q.device, strikes, "forward")
    summary = _summarise_keys(k, v, geometry, launch.block_n) if checks is not None else None
    columns, sums, norms, value_norms, tiles_k = (
        (summary.columns[1], summary.sums[0], *summary.norms, summary.tiles) if summary else (lse, lse, lse, lse, 0)
    )
    for attempt in checked.attempts:
        attention_forward_kernel[grid](
            q, k, v, out, lse, cu_q, cu_k, columns, sums, norms, value_norms, *checked.buffers,
            *geometry.strides(q, k, v, out), geometry.heads, geometry.group, geometry.max_q, geometry.max_k, tiles_k,
            geometry.max_q, _scale(scale, q) * math.log2(math.e), checked.tolerance_scale, checked.capacity, attempt,
            checked.attempts[-1], sequence, layer, CAUSAL=causal, **geometry.constants(launch), **checked.constants,
        )  # fmt: skip
    return Forward(out, lse, checked.status)


def attention_backward(
    d_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    packed: Packed | None = None,
    checks: Checks | None = None,
    ring: Ring | None = None,
    sequence: int = 0,
    layer: int = 0,
    into: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
    strikes: Sequence[Strike] = (),
    tiling: Tiling | None = None,
) -> Gradients:
    """Gradients of `attention_forward`, written to `into` (dq, dk, dv; last strides 1) if it is given.

    d_out and out have q's shape and a last stride of 1; lse is contiguous.

    The checks of dQ also hold the forward pass to account (its scores, softmax, log-sum-exp and output): such a fault
    cannot be repaired here, and is recorded as unrepaired.
    """
    geometry = _Geometry.of(q, k, packed, tiling)
    launch_q, launch_k = geometry.tiling.dq, geometry.tiling.dkdv
    dq, dk, dv = into or (torch.empty_like(x) for x in (q, k, v))
    cu_q, cu_k = geometry.cu_seqlens(lse)
    keys = _summarise_keys(k, v, geometry, launch_q.block_n) if checks is not None else None
    delta, queries = _summarise_queries(q, out, d_out, lse, geometry, launch_k.block_m, checked=checks is not None)
    common = (geometry.heads, geometry.group, geometry.max_q, geometry.max_k)
    tail = (geometry.max_q, _scale(scale, q))
    order = (sequence, layer)

    grid = (triton.cdiv(geometry.max_q, launch_q.block_m), geometry.batch * geometry.heads)
    in_dq = _Checked.of(checks, ring, grid, q.device, strikes, "dq")
    of_keys = (keys.columns[0], keys.sums[1], *keys.norms) if keys else (lse,) * 4
    inner = checks is not None and checks.inner
    for attempt in in_dq.attempts:
        attention_dq_kernel[grid](
            q, k, v, d_out, lse, delta, dq, cu_q, cu_k, *of_keys, *in_dq.buffers,
            *geometry.strides(q, k, v, d_out, dq), *common, keys.tiles if keys else 0, *tail,
            in_dq.tolerance_scale, in_dq.capacity, attempt, in_dq.attempts[-1], *order, CAUSAL=causal,
            INNER=inner, **geometry.constants(launch_q), **in_dq.constants,
        )  # fmt: skip

    grid = (triton.cdiv(geometry.max_k, launch_k.block_n), geometry.batch * geometry.key_heads)
    in_dkdv = _Checked.of(checks, ring, grid, q.device, strikes, "dkdv")
    value_norm = keys.norms[1][..., 1].amax(-1) if keys else lse
    of_queries = (*queries.columns, *queries.sums, *queries.norms, value_norm) if queries else (lse,) * 7
    for attempt in in_dkdv.attempts:
        attention_dkdv_kernel[grid](
            q, k, v, d_out, lse, delta, dk, dv, cu_q, cu_k, *of_queries, *in_dkdv.buffers,
            *geometry.strides(q, k, v, d_out, dk, dv), *common, queries.tiles if queries else 0, *tail,
            in_dkdv.tolerance_scale, in_dkdv.capacity, attempt, in_dkdv.attempts[-1], *order, CAUSAL=causal,
            INNER=inner, **geometry.constants(launch_k), **in_dkdv.constants,
        )  # fmt: skip
    return Gradients(dq, dk, dv, in_dq.status, in_dkdv.status)


@dataclasses.dataclass(frozen=True, slots=True)
class _Checked:
    """What one checked kernel gets beyond its operands."""

    status: torch.Tensor | None
    buffers: tuple[torch.Tensor, ...]
    """Status, records, cursor, order to strike."""
    capacity: int
    tolerance_scale: float
    attempts: range
    constants: dict[str, int | bool]

    @classmethod
    def of(
        cls,
        checks: Checks | None,
        ring: Ring | None,
        grid: tuple[int, int],
        device: torch.device,
        strikes: Sequence[Strike],
        kernel: str,
    ) -> _Checked:
        struck = next((strike for strike in strikes if strike.kernel == kernel), None)
        order = torch.empty(0, dtype=torch.int32, device=device)
        if struck is not None:
            words = (
                struck.block, struck.tile, struck.row, struck.column, struck.kind, struck.bits, struck.num_attempts,
            )  # fmt: skip
            order = torch.tensor(words, dtype=torch.int32, device=device)
        constants = {
            "CHECKED": checks is not None,
            "INJECT": int(struck.site) if struck is not None else 0,
            "SM_KNOWN": device.type == "cuda" and torch.version.hip is None,
        }
        if checks is None:
            return cls(None, (order,) * 4, 0, 1.0, range(1), constants)
        assert ring is not None, "checks are recorded in a ring"
        status = torch.empty(grid[0] * grid[1], NUM_STATUS_WORDS, dtype=torch.int32, device=device)
        attempts = range(checks.max_repairs + 1)
        buffers = (status, ring.records, ring.cursor, order)
        return cls(status, buffers, ring.capacity, checks.tolerance_scale, attempts, constants)


def _summarise_keys(k: torch.Tensor, v: torch.Tensor, geometry: _Geometry, block: int) -> _Summary:
    pairs = geometry.batch * geometry.key_heads
    summary = _Summary.empty(k, pairs, geometry.max_k, block, geometry)
    summarise_keys[(summary.tiles, pairs)](
        k, v, geometry.cu_seqlens(k)[1], *summary.columns, *summary.sums, *summary.norms, *geometry.strides(k, v),
        geometry.key_heads, geometry.max_k, summary.tiles, D=geometry.head_dim, D_PAD=padded(geometry.head_dim),
        BLOCK=block, NUM_COLUMNS=geometry.tiling.num_columns, VARLEN=geometry.packed is not None,
    )  # fmt: skip
    return summary


def _summarise_queries(
    q: torch.Tensor,
    out: torch.Tensor,
    d_out: torch.Tensor,
    lse: torch.Tensor,
    geometry: _Geometry,
    block: int,
    *,
    checked: bool,
) -> tuple[torch.Tensor, _Summary | None]:
    """(delta, summary of q and d_out or None)."""
    pairs = geometry.batch * geometry.heads
    delta = torch.empty(pairs, geometry.max_q, dtype=torch.float32, device=q.device)
    summary = _Summary.empty(q, pairs, geometry.max_q, block, geometry) if checked else None
    buffers = (*summary.columns, *summary.sums, *summary.norms) if summary else (delta,) * 6
    tiles = triton.cdiv(geometry.max_q, block)
    summarise_queries[(tiles, pairs)](
        q, out, d_out, lse, geometry.cu_seqlens(q)[0], delta, *buffers, *geometry.strides(q, out, d_out),
        geometry.heads, geometry.max_q, tiles, geometry.max_q, D=geometry.head_dim, D_PAD=padded(geometry.head_dim),
        BLOCK=block, NUM_COLUMNS=geometry.tiling.num_columns, VARLEN=geometry.packed is not None, CHECKED=checked,
    )  # fmt: skip
    return delta, summary


def _scale(scale: float | None, q: torch.Tensor) -> float:
    return 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale


def _tiling_on(device: torch.device, head_dim: int) -> Tiling:
    if device.type != "cuda":
        return tiling_for(head_dim, "cuda", 80)
    if torch.version.hip is not None:
        return tiling_for(head_dim, "hip", 0)
    major, minor = torch.cuda.get_device_capability(device)
    return tiling_for(head_dim, "cuda", 10 * major + minor)
