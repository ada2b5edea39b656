"""What happens around one protected operation: label, run, strike, check, mend, record.

Here for matrix products; for softmax in `softmax.py`, for fused attention in `fused.py`. The arithmetic is in
`checksum.py`, `probabilities.py` and `invariants.py`; how an operation is reached is in `seam.py`. On a CPU the check
is read at once, and a faulty operation is run again in place. On any other device nothing is read: the result of the
check goes to the record as a tensor, and a suspicion is settled in a replay of the step, which is read at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch

from resilience.abft import checksum
from resilience.abft.decisions import Decisions
from resilience.abft.defects import defects
from resilience.abft.expectation import Expectation, Expectations
from resilience.abft.gemm import Gemm, parse_gemm, unchecked_reason
from resilience.abft.labels import Label, Labels
from resilience.abft.masked import worst_under_mask
from resilience.abft.mend import rebuilt, repeat_until_clean, restore_overwritten
from resilience.abft.record import Record
from resilience.abft.seam import Handler, Original
from resilience.abft.sums import WeightSums
from resilience.abft.thresholds import UNCONFIRMED, classify
from resilience.config import DetectionConfig
from resilience.events import Check

__all__ = ["Context", "GemmHandlers", "Injector"]


class Injector(Protocol):
    """What `resilience.faults.tensor.TensorInjector` offers here."""

    @property
    def armed(self) -> bool:
        """Whether any fault is addressed to this micro-step."""

    def strike(self, site: str, layer: int, tensor: torch.Tensor, call: int = 0) -> bool:
        """Corrupt `tensor` in place if the fault plan says so at this address."""


@dataclasses.dataclass(frozen=True, slots=True)
class Context:
    """What all handlers of a process share."""

    config: DetectionConfig
    labels: Labels
    record: Record
    injector: Injector | None
    profile: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Factors on the thresholds of single sites."""
    decisions: Decisions = dataclasses.field(default_factory=Decisions)

    def is_due(self, site: str, node: int, *, follows: int | None) -> bool:
        """Whether an operation under `node` is among the share that is checked; counts it.

        A gradient is checked where its forward was: what its check needs was read there, and what a forward's check
        cannot see is found by that of its gradients. What is computed again is checked where it was the first time.

        Args:
            site: of the operation.
            node: the number of its autograd node.
            follows: that of the operation it belongs to, if there is one; of a gradient the same number.
        """
        followed = None if follows is None else self.decisions.of(follows)
        is_due = self.record.due(site) if followed is None else self.record.follows(site, followed)
        if follows != node:
            self.decisions.made(node, is_due)
        return is_due

    def scale(self, site: str) -> float:
        """Factor on the threshold of the first stage at this site; the second stage knows `threshold_scale` only."""
        return self.config.threshold_scale * self.profile.get(site, 1.0)

    def strike(self, site: str, layer: int, tensor: torch.Tensor) -> None:
        """Let the fault plan corrupt a result, as broken hardware would: after the arithmetic, before the check."""
        if self.injector is not None and self.injector.armed:
            self.injector.strike(site, layer, tensor)

    def inputs_alarm(self, label: Label, check: Check, out: torch.Tensor, ratio: float, started: float) -> None:
        """Record an operation whose operands were not finite already."""
        kind = classify(float(out.abs().max()), torch.finfo(out.dtype).max)
        self.record.alarm(label, check, kind, ratio, started, inputs_bad=True)


class GemmHandlers:
    """Checksums around matrix products."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._scale = context.config.threshold_scale
        self._sums = WeightSums()
        self._expectations = Expectations(self._sums)

    def clear(self) -> None:
        """Forget the sums of weights, and those that wait for their backward: a step or a replay begins."""
        self._sums.clear()
        self._expectations.clear()

    def pass_ends(self) -> None:
        """Forget what waits for a backward pass. It refers to parameters, which torch does not swap for others then
        (`torch.__future__.set_swap_module_params_on_conversion`).
        """
        self._expectations.clear()

    def handler(self, operator: str) -> Handler:
        """The handler of one of `gemm.GEMM_OPERATORS`."""
        context = self._context
        labels, record = context.labels, context.record

        def handle(original: Original, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            try:
                gemm = parse_gemm(operator, args, kwargs)
                label = None if gemm is None else labels.gemm(gemm)
            except defects() as error:
                record.failed(operator, error)
                return original(*args, **kwargs)
            if gemm is None or label is None:
                record.count_unprotected(unchecked_reason(operator, args))
                return original(*args, **kwargs)
            node, original_node, in_forward = labels.sequence, labels.original, labels.is_left is None

            def run() -> torch.Tensor:
                out: torch.Tensor = original(*args, **kwargs)
                context.strike(label.site, label.layer, out)
                return out

            out = record.operation(label.site, run)
            if not context.is_due(label.site, node, follows=original_node if in_forward else node):
                return out
            with record.checking(label.site) as started:
                if in_forward:
                    expectation = self._expectations.forward(gemm, out, node, recomputed=original_node)
                else:
                    expectation = self._expectations.backward(gemm, out, node)
                return self._check(_Call(label, gemm, node, expectation, run, started), out)
            return out

        return handle

    def _check(self, call: _Call, out: torch.Tensor) -> torch.Tensor:
        record = self._context.record
        if not record.reads_at_once(out):
            record.defer(call.label, Check.CHECKSUM, self._deferred(call, out))
            return out
        worst = self._worst(call, out)
        if worst <= 1.0:
            record.clean(call.label.site, worst)
            return out
        with record.settling(call.label, Check.CHECKSUM, worst, call.started):
            return self._settle(call, out, worst)
        return out

    def _settle(self, call: _Call, out: torch.Tensor, worst: float) -> torch.Tensor:
        """What becomes of a product that the first stage suspects."""
        record = self._context.record
        # What was kept of the operands is stale where a parameter changed without a new version.
        self._expectations.discard(call.gemm, call.node)
        call.expectation = self._expectations.alone(call.gemm, out)
        confirmation = self._confirm(call, out)
        if confirmation.kind is not None:
            by_sums = self._context.config.mend == "rebuild" or not call.gemm.repeatable
            if by_sums and rebuilt(call.gemm, out, tolerance_scale=self._scale):
                record.alarm(
                    call.label, Check.CHECKSUM, confirmation.kind, worst, call.started, mended=True, bit_exact=False
                )
                return out
            mended = self._mend(call)
            record.alarm(call.label, Check.CHECKSUM, confirmation.kind, worst, call.started, mended=mended is not None)
            return out if mended is None else mended
        if confirmation.inputs_bad:
            self._context.inputs_alarm(call.label, Check.CHECKSUM, out, worst, call.started)
        else:
            record.dismissed(call.label.site, worst)
        return out

    def _worst(self, call: _Call, out: torch.Tensor) -> float:
        worst = worst_under_mask if call.expectation.is_masked else checksum.worst_residual
        return worst(call.expectation, out, factor_scale=self._context.scale(call.label.site))

    def _deferred(self, call: _Call, out: torch.Tensor) -> torch.Tensor:
        expectation = call.expectation
        return checksum.deferred_residual(
            expectation.gemm,
            expectation.sums,
            expectation.observed(out),
            out.dtype,
            factor_scale=self._context.scale(call.label.site) * UNCONFIRMED,
        )

    def _confirm(self, call: _Call, out: torch.Tensor) -> checksum.Confirmation:
        expectation = call.expectation
        ratio = checksum.screen(
            expectation.gemm,
            expectation.sums,
            expectation.observed(out),
            out.dtype,
            factor_scale=self._context.scale(call.label.site),
            finite_rows=True,
        )
        return checksum.confirm(expectation.gemm, expectation.oriented(out), ratio, tolerance_scale=self._scale)

    def _mend(self, call: _Call) -> torch.Tensor | None:
        """The result of the same call again, verified; None if it cannot be repeated or stays faulty."""

        def again() -> torch.Tensor:
            restore_overwritten(call.gemm)
            return call.run()

        def clean(out: torch.Tensor) -> bool:
            return self._worst(call, out) <= 1.0 or self._confirm(call, out).kind is None

        max_mends = self._context.config.max_mends if call.gemm.repeatable else 0
        return repeat_until_clean(again, clean, max_mends=max_mends)


@dataclasses.dataclass(slots=True)
class _Call:
    """One product that is being checked."""

    label: Label
    gemm: Gemm
    node: int
    expectation: Expectation
    run: Callable[[], torch.Tensor]
    """Makes the same call again, through the fault plan too."""
    started: float
