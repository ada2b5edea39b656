"""What happens around fused attention (the SDPA operators): label, run, strike, hold the identities, mend, record.

The operators' arguments are bound by the names in their schemas, so that the CPU's, flash, memory-efficient and cuDNN
forms are one. The calls are pure: on a CPU a backward that fails is run again in place. What `invariants.py` sees of a
forward fault only in backward (O within the range of V) cannot be repaired there: it is reported unmended, for a
replay. What fails its identities again and again without being wrong by `attention_reference.py` is dismissed: the same
in every replay, it would cost a healthy device its place.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch

from resilience.abft.attention_reference import (
    AttentionInputs,
    backward_is_explained,
    forward_is_explained,
    scores_may_overflow,
)
from resilience.abft.defects import defects
from resilience.abft.handlers import Context
from resilience.abft.invariants import (
    BACKWARD_SITES,
    AttentionBackward,
    AttentionForward,
    backward_ratios,
    forward_ratio,
)
from resilience.abft.labels import Label
from resilience.abft.mend import repeat_until_clean
from resilience.abft.seam import Handler, Original
from resilience.abft.thresholds import classify
from resilience.events import Check, DetectionKind

__all__ = ["FUSED_OPERATORS", "bind", "fused_backward_handler", "fused_forward_handler"]

FUSED_OPERATORS = (
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
)
"""Forward operators; each has a `…_backward`. The last one is what back-ends outside of PyTorch fill in."""

_Verdict = Callable[[Any], bool]

_GRADIENT_SITES = ("attention.dq", "attention.dk", "attention.dv")


def bind(operator: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a call by the names in the operator's schema, defaults filled in."""
    schema = getattr(torch.ops.aten, operator).default._schema
    bound = {argument.name: argument.default_value for argument in schema.arguments}
    bound.update({argument.name: value for argument, value in zip(schema.arguments, args, strict=False)})
    bound.update(kwargs)
    return bound


def fused_forward_handler(context: Context, operator: str) -> Handler:
    """The handler of one of `FUSED_OPERATORS`."""

    def handle(original: Original, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            bound = bind(operator, args, kwargs)
            label = context.labels.fused_attention((bound["query"], bound["key"], bound["value"]))
            node, original_node = context.labels.sequence, context.labels.original
        except defects() as error:
            context.record.failed(operator, error)
            return original(*args, **kwargs)

        def run() -> Any:
            results = original(*args, **kwargs)
            context.strike(label.site, label.layer, results[0])
            return results

        def ratio(results: Any) -> torch.Tensor:
            masked = _mask(bound) is not None
            # The other forms pad the log-sum-exp; only the CPU's is read.
            logsumexp = results[1] if results[1].device.type == "cpu" else None
            call = AttentionForward(bound["value"], results[0], logsumexp, masked, bound["dropout_p"] > 0)
            return forward_ratio(call).reshape(1)

        def is_explained(results: Any) -> bool:
            # A mean of V leaves no range, scores may; a log-sum-exp that is no number shows in the ratio only.
            inputs = _inputs(context, bound)
            is_number = bool(ratio(results).isfinite().all())
            return (is_number or scores_may_overflow(inputs)) and forward_is_explained(inputs, results[0])

        results = context.record.operation(label.site, run)
        operands = (bound["query"], bound["key"], bound["value"])
        # Dropout would draw other random numbers the second time.
        max_mends = context.config.max_mends if bound["dropout_p"] == 0.0 else 0
        explained = _where_known(bound, is_explained)
        call = _Call(label, node, original_node, (label.site,), operands, run, ratio, explained, max_mends)
        return _guarded(context, call, results)

    return handle


def fused_backward_handler(context: Context, operator: str) -> Handler:
    """The handler of the backward of one of `FUSED_OPERATORS`."""
    backward = f"{operator}_backward"

    def handle(original: Original, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            bound = bind(backward, args, kwargs)
            d_out = bound["grad_out"] if "grad_out" in bound else bound["grad_out_"]
            layer = context.labels.fused_attention_backward((bound["query"], bound["key"], bound["value"]))
        except defects() as error:
            context.record.failed(backward, error)
            return original(*args, **kwargs)

        def run() -> Any:
            results = original(*args, **kwargs)
            for site, gradient in zip(_GRADIENT_SITES, results, strict=False):
                if gradient is not None:
                    context.strike(site, layer, gradient)
            return results

        def ratios(results: Any) -> torch.Tensor:
            query = bound["query"]
            call = AttentionBackward(
                query,
                bound["key"],
                bound["value"],
                bound["out"],
                d_out,
                results[0],
                results[1],
                results[2],
                scale=_scale(bound),
                mask=_mask(bound),
                dropout=bound["dropout_p"] > 0,
            )
            return backward_ratios(call)

        def is_explained(results: Any) -> bool:
            return backward_is_explained(_inputs(context, bound), bound["out"], d_out, results[:3])

        label, node = Label(BACKWARD_SITES[0], layer), context.labels.sequence
        results = context.record.operation(label.site, run)
        operands = (bound["query"], bound["key"], bound["value"], bound["out"], d_out)
        explained, max_mends = _where_known(bound, is_explained), context.config.max_mends
        call = _Call(label, node, node, BACKWARD_SITES, operands, run, ratios, explained, max_mends)
        return _guarded(context, call, results)

    return handle


def _inputs(context: Context, bound: dict[str, Any]) -> AttentionInputs:
    return AttentionInputs(
        bound["query"],
        bound["key"],
        bound["value"],
        _scale(bound),
        _mask(bound),
        causal=bound["is_causal"],
        tolerance_scale=context.config.threshold_scale,
    )


def _scale(bound: dict[str, Any]) -> float:
    return bound["scale"] if bound["scale"] is not None else 1.0 / math.sqrt(bound["query"].shape[-1])


def _where_known(bound: dict[str, Any], is_explained: _Verdict) -> _Verdict:
    """Not which probabilities dropout left out, nor how a GPU's back-ends align a causal mask over unequal lengths."""
    query, key = bound["query"], bound["key"]
    is_aligned = not bound["is_causal"] or query.shape[2] == key.shape[2] or query.is_cpu
    return is_explained if bound["dropout_p"] == 0.0 and is_aligned else lambda results: False


def _mask(bound: dict[str, Any]) -> torch.Tensor | None:
    mask: torch.Tensor | None = bound.get("attn_mask", bound.get("attn_bias"))
    return mask


@dataclasses.dataclass(frozen=True, slots=True)
class _Call:
    """One call that is being checked."""

    label: Label
    node: int
    """The number of its autograd node."""
    follows: int | None
    """That of the operation it belongs to, if there is one."""
    sites: tuple[str, ...]
    """To blame for the ratios, in order."""
    operands: tuple[torch.Tensor, ...]
    run: Callable[[], Any]
    """Makes the same call again, through the fault plan too."""
    ratios: Callable[[Any], torch.Tensor]
    """Residual ÷ tolerance of the identities, of its results."""
    is_explained: _Verdict
    """Whether round-off explains all that was computed, by a reference in float64."""
    max_mends: int


def _guarded(context: Context, call: _Call, results: Any) -> Any:
    """Hold one call against its identities."""
    label, record, scale = call.label, context.record, context.scale(call.label.site)
    checked = [result for result in results[: len(_GRADIENT_SITES)] if result is not None]
    if not checked or checked[0].numel() == 0 or not context.is_due(label.site, call.node, follows=call.follows):
        return results
    with record.checking(label.site) as started:
        found = call.ratios(results) / scale
        if not record.reads_at_once(found):
            finite = torch.stack([operand.isfinite().all() for operand in call.operands]).all()
            for site, ratio in zip(call.sites, found, strict=True):
                record.defer(Label(site, label.layer), Check.INVARIANT, torch.stack([ratio.float(), (~finite).float()]))
            return results
        values = found.tolist()
        if all(value <= 1.0 for value in values):
            record.clean(label.site, max(values))
            return results
        index = next(number for number, value in enumerate(values) if not value <= 1.0)
        blamed = Label(call.sites[index], label.layer)
        with record.settling(blamed, Check.INVARIANT, values[index], started):
            if not all(bool(operand.isfinite().all()) for operand in call.operands):
                context.inputs_alarm(blamed, Check.INVARIANT, checked[0], values[index], started)
                return results
            mended = repeat_until_clean(
                call.run, lambda again: bool((call.ratios(again) / scale <= 1.0).all()), max_mends=call.max_mends
            )
            # Also what is not finite: a gradient may leave the dtype's range rightly.
            if mended is None and call.is_explained(results):
                record.dismissed(blamed.site, values[index])
                return results
            record.alarm(blamed, Check.INVARIANT, _kind(checked), values[index], started, mended=mended is not None)
            return results if mended is None else mended
    return results


def _kind(results: list[torch.Tensor]) -> DetectionKind:
    """By the most extreme value in any floating-point result."""
    kinds = [
        classify(float(result.abs().max()), torch.finfo(result.dtype).max)
        for result in results
        if result.is_floating_point() and result.numel() > 0
    ]
    extremes = [kind for kind in kinds if kind is not DetectionKind.MISMATCH]
    return extremes[0] if extremes else DetectionKind.MISMATCH
