"""What happens around a softmax of eager attention, forward and backward: label, run, strike, check, mend, record.

Every other softmax passes by (`Labels.softmax` says which). The arithmetic is in `probabilities.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from resilience.abft.checksum import Confirmation
from resilience.abft.defects import defects
from resilience.abft.handlers import Context
from resilience.abft.labels import Label
from resilience.abft.mend import repeat_until_clean
from resilience.abft.probabilities import (
    confirm_gradient,
    confirm_softmax,
    screen_gradient,
    screen_softmax,
    unusable_for_gradient,
    unusable_for_softmax,
)
from resilience.abft.seam import Handler, Original
from resilience.abft.thresholds import UNCONFIRMED
from resilience.events import Check

__all__ = ["softmax_backward_handler", "softmax_handler"]


@dataclasses.dataclass(frozen=True, slots=True)
class _RowCheck:
    """One operation whose rows are held against what they must sum to."""

    label: Label
    unusable: Callable[[], tuple[torch.Tensor, torch.Tensor]]
    """(rows that see no key, other rows whose inputs are not finite), (rows,) each, on the device."""
    screen: Callable[[torch.Tensor], torch.Tensor]
    """Residual ÷ tolerance of every row of the result."""
    confirm: Callable[[torch.Tensor, torch.Tensor], Confirmation]
    """Of the result and its ratios."""

    def run(self, context: Context, run: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The result of `run`, checked and mended."""
        out = context.record.operation(self.label.site, run)
        if not context.record.due(self.label.site):
            return out
        with context.record.checking(self.label.site) as started:
            if context.record.reads_at_once(out):
                return self._judge(context, out, run, started)
            context.record.defer(self.label, Check.CHECKSUM, self._deferred(out))
        return out

    def _deferred(self, out: torch.Tensor) -> torch.Tensor:
        """(worst ratio, whether the inputs were bad), (2,), on the device and without waiting."""
        keyless, bad = self.unusable()
        worst = self.screen(out).masked_fill_(keyless, 0.0).max() / UNCONFIRMED
        return torch.stack([worst.float(), bad.any().float()])

    def _judge(
        self, context: Context, out: torch.Tensor, run: Callable[[], torch.Tensor], started: float
    ) -> torch.Tensor:
        ratio = self.screen(out)
        worst = float(ratio.max())
        if worst <= 1.0:
            context.record.clean(self.label.site, worst)
            return out
        with context.record.settling(self.label, Check.CHECKSUM, worst, started):
            return self._settle(context, out, ratio, run, started)
        return out

    def _settle(
        self, context: Context, out: torch.Tensor, ratio: torch.Tensor, run: Callable[[], torch.Tensor], started: float
    ) -> torch.Tensor:
        worst, confirmation = float(ratio.max()), self.confirm(out, ratio)
        if confirmation.kind is not None:
            mended = repeat_until_clean(run, self._is_clean, max_mends=context.config.max_mends)
            context.record.alarm(
                self.label, Check.CHECKSUM, confirmation.kind, worst, started, mended=mended is not None
            )
            return out if mended is None else mended
        elif confirmation.inputs_bad:
            context.inputs_alarm(self.label, Check.CHECKSUM, out, worst, started)
        else:
            context.record.dismissed(self.label.site, worst)
        return out

    def _is_clean(self, out: torch.Tensor) -> bool:
        ratio = self.screen(out)
        return float(ratio.max()) <= 1.0 or self.confirm(out, ratio).kind is None


def softmax_handler(context: Context) -> Handler:
    """Σ_j P_ij = 1 around `aten::_softmax`."""
    scale = context.config.threshold_scale

    def handle(original: Original, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        scores, dimension = args[0], args[1]
        last = dimension in (-1, scores.dim() - 1)
        label = None
        if last and scores.dim() >= 3 and scores.numel() > 0:
            label = _label(context, "_softmax", lambda: context.labels.softmax(scores))
        if label is None:
            return original(*args, **kwargs)
        check = _RowCheck(
            label,
            lambda: unusable_for_softmax(scores),
            lambda out: screen_softmax(out) / context.scale(label.site),
            lambda out, ratio: confirm_softmax(scores, out, ratio, tolerance_scale=scale),
        )
        return check.run(context, _struck(context, label, original, args, kwargs))

    return handle


def softmax_backward_handler(context: Context) -> Handler:
    """Σ_j dS_ij = 0 around `aten::_softmax_backward_data`."""
    scale = context.config.threshold_scale

    def handle(original: Original, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        d_probabilities, probabilities = args[0], args[1]
        label = None
        if probabilities.numel() > 0:
            label = _label(context, "_softmax_backward_data", context.labels.softmax_backward)
        if label is None:
            return original(*args, **kwargs)
        check = _RowCheck(
            label,
            lambda: unusable_for_gradient(d_probabilities, probabilities),
            lambda out: screen_gradient(out) / context.scale(label.site),
            lambda out, ratio: confirm_gradient(d_probabilities, probabilities, out, ratio, tolerance_scale=scale),
        )
        return check.run(context, _struck(context, label, original, args, kwargs))

    return handle


def _label(context: Context, operator: str, named: Callable[[], Label | None]) -> Label | None:
    """What `named` says; None after a defect, which is recorded."""
    try:
        return named()
    except defects() as error:
        context.record.failed(operator, error)
        return None


def _struck(
    context: Context, label: Label, original: Original, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Callable[[], torch.Tensor]:
    def run() -> torch.Tensor:
        out: torch.Tensor = original(*args, **kwargs)
        context.strike(label.site, label.layer, out)
        return out

    return run
