"""What happens around a softmax of eager attention, forward and backward: label, run, strike, check, mend, record.

Every other softmax passes by. The arithmetic is in `probabilities.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from resilience.abft.checksum import Confirmation
from resilience.abft.handlers import Context
from resilience.abft.labels import Label
from resilience.abft.mend import repeat_until_clean
from resilience.abft.probabilities import (
    confirm_gradient,
    confirm_softmax,
    screen_gradient,
    screen_softmax,
)
from resilience.abft.seam import Handler, Original
from resilience.abft.thresholds import UNCONFIRMED
from resilience.events import Check

__all__ = ["softmax_backward_handler", "softmax_handler"]


@dataclasses.dataclass(frozen=True, slots=True)
class _RowCheck:
    """One operation whose rows are held against what they must sum to."""

    label: Label
    inputs: tuple[torch.Tensor, ...]
    screen: Callable[[torch.Tensor], torch.Tensor]
    """Residual ÷ tolerance of every row of the result."""
    confirm: Callable[[torch.Tensor, torch.Tensor], Confirmation]
    """Of the result and its ratios."""

    def run(self, context: Context, run: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The result of `run`, checked and mended."""
        out = context.record.operation(self.label.site, run)
        if not context.record.due(self.label.site):
            return out
        with context.record.timed(self.label.site) as started:
            if out.device.type != "cpu":
                bad = torch.stack([operand.isnan().any() for operand in self.inputs]).any()
                worst = self.screen(out).max() / UNCONFIRMED
                context.record.defer(self.label, Check.CHECKSUM, torch.stack([worst.float(), bad.float()]))
                return out
            return self._judge(context, out, run, started)

    def _judge(
        self, context: Context, out: torch.Tensor, run: Callable[[], torch.Tensor], started: float
    ) -> torch.Tensor:
        worst, confirmation = self._suspicion(out)
        if worst <= 1.0:
            context.record.clean(self.label.site, worst)
        elif confirmation.kind is not None:
            mended = repeat_until_clean(
                run, lambda again: self._suspicion(again)[1].kind is None, max_mends=context.config.max_mends
            )
            context.record.alarm(
                self.label, Check.CHECKSUM, confirmation.kind, worst, started, mended=mended is not None
            )
            return out if mended is None else mended
        elif confirmation.inputs_bad:
            context.inputs_alarm(self.label, Check.CHECKSUM, out, worst, started)
        else:
            context.record.dismissed(self.label.site, worst)
        return out

    def _suspicion(self, out: torch.Tensor) -> tuple[float, Confirmation]:
        ratio = self.screen(out)
        worst = float(ratio.max())
        return worst, Confirmation(None, False) if worst <= 1.0 else self.confirm(out, ratio)


def softmax_handler(context: Context) -> Handler:
    """Σ_j P_ij = 1 around `aten::_softmax`."""
    scale = context.config.threshold_scale

    def handle(original: Original, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        scores, dimension = args[0], args[1]
        last = dimension in (-1, scores.dim() - 1)
        label = context.labels.softmax() if last and scores.dim() >= 3 and scores.numel() > 0 else None
        if label is None:
            return original(*args, **kwargs)
        check = _RowCheck(
            label,
            (scores,),
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
        label = context.labels.softmax_backward() if probabilities.numel() > 0 else None
        if label is None:
            return original(*args, **kwargs)
        check = _RowCheck(
            label,
            (d_probabilities, probabilities),
            lambda out: screen_gradient(out) / context.scale(label.site),
            lambda out, ratio: confirm_gradient(d_probabilities, probabilities, out, ratio, tolerance_scale=scale),
        )
        return check.run(context, _struck(context, label, original, args, kwargs))

    return handle


def _struck(
    context: Context, label: Label, original: Original, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Callable[[], torch.Tensor]:
    def run() -> torch.Tensor:
        out: torch.Tensor = original(*args, **kwargs)
        context.strike(label.site, label.layer, out)
        return out

    return run
