"""Fused attention at strength `kernel`: our own kernel, which checks and repairs itself, in place of the operator's.

`resilience.kernels.attention` computes what its `supports` accepts; everything else goes to the operator, held by the
invariants of `fused.py`, counted by reason. Whether a call is ours depends on shapes, dtypes and masks alone, and the
checks are always on: a replay takes the same path and gives the same bits. These are not the bits of the operator that
is replaced, to which a kernel that fails to run leaves its place for good: only the step in which it fails has both.

Nothing waits for the device. Failing blocks were run again by the kernel; what became of them is read from its ring
when the step is over (`drain`): repaired blocks are mended findings, the others ask for a replay.

A fault plan strikes the stored result, behind the checks in the kernel: while one is armed, the invariants hold the
call, too.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from resilience.abft.defects import defects
from resilience.abft.fused import bind, fused_backward_handler, fused_forward_handler
from resilience.abft.handlers import Context
from resilience.abft.invariants import BACKWARD_SITES
from resilience.abft.labels import Label
from resilience.abft.seam import Handler, Original
from resilience.events import Check, DetectionKind
from resilience.kernels import triton_kernels

__all__ = ["REPLACED_OPERATORS", "InKernelAttention"]

REPLACED_OPERATORS = (
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
)
"""What PyTorch calls on a CUDA device; each has a `…_backward`."""

_RING_CAPACITY = 4096
"""Records kept between two drains; 40 bytes each."""

_LARGEST_OFFSET = 2**31 - 1
"""In elements, from a key head's first query head to its last: the kernels multiply that in 32 bits."""

_SITES = {
    "SCORES": "attention.scores",
    "CONTEXT": "attention.context",
    "ROW_SUM": "attention.probs",
    "MASS": "attention.probs",
    "DS": "attention.ds",
    "DQ": "attention.dq",
    "DV": "attention.dv",
    "DK": "attention.dk",
    "SCORES_AGAIN": "attention.scores",
    "DP": "attention.dp",
    "DP_ROWS": "attention.dp",
    "DS_ROWS": "attention.ds",
    "QUOTIENT": "attention.ds",
}
"""Site of the fault plan that a check holds, by its name in `CheckBit` (kernels/attention/records.py)."""

Packer = Callable[[dict[str, Any], torch.Tensor, torch.Tensor], tuple[Any, ...]]
"""Makes the results of an operator from its arguments, O and the log-sum-exp (b, h, tq)."""

FindKernels = Callable[[str, torch.Tensor], ModuleType | None]


class InKernelAttention:
    """Handlers of the fused attentions of one process, and what their kernels have reported.

    Args:
        context: shared with the other handlers.
        find: the module of kernels that serves a tensor, None where there is none.
    """

    def __init__(self, context: Context, *, find: FindKernels = triton_kernels) -> None:
        self._context = context
        self._find = find
        self._rings: dict[torch.device, Any] = {}
        self._num_calls = 0
        self._broken: dict[str, str] = {}
        """Operators whose place our kernel could not take, and why."""
        self.fallbacks: Counter[str] = Counter()
        """Calls that went to the operator and its invariants, by reason."""

    def forward(self, operator: str) -> Handler:
        """The handler of a forward operator; its results are packed as that operator's are."""
        context, fallback, pack = self._context, fused_forward_handler(self._context, operator), _PACKERS[operator]

        def handle(original: Original, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            kernels, bound = self._bound(operator, args, kwargs)
            if kernels is None:
                return fallback(original, args, kwargs)

            query, key, value = bound["query"], bound["key"], bound["value"]

            def ours(layer: int) -> Any:
                out = _like(operator, query)
                run = kernels.attention_forward(query, key, value, out=out, **self._options(kernels, bound, layer))
                return pack(bound, run.out, run.lse)

            if self._is_armed:
                return fallback(lambda *_, **__: ours(-1), args, kwargs)
            label = context.labels.fused_attention((query, key, value))
            context.is_due(label.site, context.labels.sequence, follows=context.labels.original)
            return self._run(operator, label, ours, lambda: original(*args, **kwargs))

        return handle

    def backward(self, operator: str) -> Handler:
        """The handler of the backward of a forward operator."""
        name = f"{operator}_backward"
        context, fallback = self._context, fused_backward_handler(self._context, operator)
        num_results = len(getattr(torch.ops.aten, name).default._schema.returns)

        def handle(original: Original, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            kernels, bound = self._bound(name, args, kwargs)
            if kernels is None:
                return fallback(original, args, kwargs)

            query, key, value = operands = bound["query"], bound["key"], bound["value"]

            def ours(layer: int) -> Any:
                d_out = _readable(bound["grad_out"] if "grad_out" in bound else bound["grad_out_"])
                lse = _plain_lse(bound["logsumexp"], query)
                into = tuple(_like(name, operand) for operand in operands)
                options = self._options(kernels, bound, layer)
                run = kernels.attention_backward(
                    d_out, query, key, value, _readable(bound["out"]), lse, into=into, **options
                )
                return (run.dq, run.dk, run.dv, None)[:num_results]

            if self._is_armed:
                return fallback(lambda *_, **__: ours(-1), args, kwargs)
            label = Label(BACKWARD_SITES[0], context.labels.fused_attention_backward(operands))
            context.is_due(label.site, context.labels.sequence, follows=context.labels.sequence)
            return self._run(name, label, ours, lambda: original(*args, **kwargs))

        return handle

    def drain(self) -> None:
        """Turn what the kernels have recorded into findings. Waits for the devices: call it at the boundary only."""
        self._num_calls = 0
        for ring in self._rings.values():
            records, num_lost = ring.drain()
            self._report(records)
            if num_lost:
                self._alarm(Label("attention.context", -1), math.inf, inputs_bad=records[-1].verdict.name == "INPUTS")

    @property
    def _is_armed(self) -> bool:
        injector = self._context.injector
        return injector is not None and injector.armed

    def _run(self, name: str, label: Label, ours: Callable[[int], Any], theirs: Callable[[], Any]) -> Any:
        """Our results; those of the operator where our kernel cannot run here, which is not tried again."""
        try:
            return ours(label.layer)
        except defects() as error:
            self._broken[name] = f"its kernel failed ({type(error).__name__})"
            self._context.record.not_made(label.site, error)
        # Only now is the memory free that the failed call had: an exception keeps its frames.
        return theirs()

    def _bound(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """(module of kernels that takes this call of operator `name` or None, its arguments); counts why not."""
        bound: dict[str, Any] = {}
        reason = self._broken.get(name, "")
        if not reason:
            try:
                bound = bind(name, args, kwargs)
                kernels, reason = self._kernels(bound)
            except defects() as error:
                reason = self._broken[name] = f"its arguments are not known ({type(error).__name__})"
        if reason:
            self.fallbacks[reason] += 1
            return None, bound
        return kernels, bound

    def _kernels(self, bound: dict[str, Any]) -> tuple[Any, str]:
        """(module of kernels that can take this call or None, why not)."""
        query, key, value = bound["query"], bound["key"], bound["value"]
        if query.dim() != 4:
            return None, f"tensors of {query.dim()} dimensions"
        kernels = self._find("attention.api", query)
        if kernels is None:
            return None, "no GPU, or no Triton"
        if bound["is_causal"] and query.shape[2] != key.shape[2]:
            # Back-ends differ in where they align the mask.
            return None, "a causal mask over unequal lengths"
        apart = max(query.stride(1), query.shape[2] * query.shape[3])
        if apart * query.shape[1] > _LARGEST_OFFSET * key.shape[1]:
            return None, "heads that lie too far apart"
        if bound.get("return_debug_mask"):
            return None, "a debug mask is asked for"
        mask = bound.get("attn_mask", bound.get("attn_bias"))
        reason = kernels.supports(query, key, value, mask, dropout=bound["dropout_p"])
        return (kernels, "") if reason is None else (None, reason)

    def _options(self, kernels: Any, bound: dict[str, Any], layer: int) -> dict[str, Any]:
        config, device = self._context.config, bound["query"].device
        self._num_calls += 1
        if device not in self._rings:
            self._rings[device] = kernels.Ring(device, capacity=_RING_CAPACITY)
        checks = kernels.Checks(max_repairs=config.max_mends, tolerance_scale=config.threshold_scale)
        return {
            "causal": bound["is_causal"],
            "scale": bound["scale"],
            "checks": checks,
            "ring": self._rings[device],
            "sequence": self._num_calls,
            "layer": layer,
        }

    def _report(self, records: list[Any]) -> None:
        """One finding for all blocks of a call that failed the same check with the same end."""
        groups: defaultdict[tuple[int, Label, str], list[float]] = defaultdict(list)
        for record in records:
            first = next(iter(record.checks))
            groups[record.sequence, Label(_SITES[first.name], record.layer), record.verdict.name].append(record.ratio)
        for (_, label, verdict), ratios in groups.items():
            self._alarm(label, max(ratios), mended=verdict == "REPAIRED", inputs_bad=verdict == "INPUTS")

    def _alarm(self, label: Label, ratio: float, *, mended: bool = False, inputs_bad: bool = False) -> None:
        record = self._context.record
        kind = DetectionKind.MISMATCH if math.isfinite(ratio) else DetectionKind.NAN
        with record.checking(label.site) as started:
            record.alarm(label, Check.CHECKSUM, kind, ratio, started, mended=mended, inputs_bad=inputs_bad)


def _like(operator: str, operand: torch.Tensor) -> torch.Tensor:
    """Memory for a result of `operand`'s shape, laid out as the operator would."""
    if "efficient" in operator or "for_cpu" in operator:
        return torch.empty_like(operand.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
    return torch.empty_like(operand)


def _readable(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _plain_lse(lse: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """Log-sum-exp as (b, h, tq), contiguous, from the forms in which operators keep it."""
    batch, heads, length, _ = query.shape
    return lse.reshape(batch, heads, -1)[:, :, :length].contiguous()


def _seeds(query: torch.Tensor, *, flash: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """What operators return for the random numbers of a dropout that there is not."""
    if flash and torch.version.hip is None:
        return tuple(torch.zeros(size, dtype=torch.uint64, device=query.device) for size in ((2,), ()))  # type: ignore[return-value]
    return tuple(torch.zeros((), dtype=torch.int64, device=query.device) for _ in range(2))  # type: ignore[return-value]


def _pack_flash(bound: dict[str, Any], out: torch.Tensor, lse: torch.Tensor) -> tuple[Any, ...]:
    query, key = bound["query"], bound["key"]
    return out, lse, None, None, query.shape[2], key.shape[2], *_seeds(query, flash=True), query.new_empty(0)


def _pack_efficient(bound: dict[str, Any], out: torch.Tensor, lse: torch.Tensor) -> tuple[Any, ...]:
    """The log-sum-exp is padded to a multiple of 32 queries with infinity, as the operator's backward expects."""
    length = out.shape[2] if bound["compute_log_sumexp"] else 0
    padded = length if torch.version.hip is not None else -(-length // 32) * 32
    lse = torch.nn.functional.pad(lse[:, :, :length], (0, padded - length), value=math.inf)
    return out, lse, *_seeds(out, flash=False)


def _pack_cudnn(bound: dict[str, Any], out: torch.Tensor, lse: torch.Tensor) -> tuple[Any, ...]:
    query, key = bound["query"], bound["key"]
    return out, lse[..., None], None, None, query.shape[2], key.shape[2], *_seeds(query, flash=False), None


def _pack_cpu(bound: dict[str, Any], out: torch.Tensor, lse: torch.Tensor) -> tuple[Any, ...]:
    return out, lse


_PACKERS: dict[str, Packer] = {
    "_scaled_dot_product_flash_attention": _pack_flash,
    "_scaled_dot_product_efficient_attention": _pack_efficient,
    "_scaled_dot_product_cudnn_attention": _pack_cudnn,
    # No kernel of Triton runs on a CPU: this form is reached by tests, through its interpreter.
    "_scaled_dot_product_flash_attention_for_cpu": _pack_cpu,
}
