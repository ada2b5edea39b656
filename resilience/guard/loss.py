"""Whether a loss is far above those of the last steps, by a robust score. Pure: numbers in, numbers out.

The score is how many robust deviations (1.4826 × the median absolute deviation, which for a normal distribution is the
standard deviation) a loss lies above the median of the last steps. Off unless `policy.loss_spike_factor` is set: losses
of healthy runs do spike.
"""

from __future__ import annotations

import collections
import math
import statistics

from resilience.abft.finding import Finding
from resilience.events import Check, DetectionKind

__all__ = ["LossHistory"]

_NUM_STEPS = 64
_NUM_SILENT_STEPS = 16
"""Steps that it sees before it speaks."""

_CONSISTENCY = 1.4826
"""Median absolute deviation → standard deviation, for a normal distribution."""

_DEVIATION_MIN = 1e-3
"""Least deviation, as a share of the median: where the losses hardly move, a hair is no spike."""


class LossHistory:
    """The losses of the last steps on one rank.

    Args:
        factor: `PolicyConfig.loss_spike_factor`; 0 never alarms.
    """

    def __init__(self, factor: float) -> None:
        self._factor = factor
        self._losses: collections.deque[tuple[int, float]] = collections.deque(maxlen=_NUM_STEPS)

    @property
    def is_on(self) -> bool:
        """Whether anything is ever an alarm."""
        return self._factor > 0

    def add(self, step: int, loss: float) -> None:
        """Take the loss of a step that was taken into the history; one that is not finite is left out."""
        if math.isfinite(loss):
            self._losses.append((step, loss))

    def rewound(self, step: int) -> None:
        """Forget the losses of the steps after `step`: they are taken again."""
        kept = [entry for entry in self._losses if entry[0] <= step]
        self._losses.clear()
        self._losses.extend(kept)

    def score(self, loss: float) -> float:
        """Robust deviations by which `loss` lies above the median; 0 while too few steps were seen."""
        seen = [value for _, value in self._losses]
        if len(seen) < _NUM_SILENT_STEPS:
            return 0.0
        median = statistics.median(seen)
        deviation = _CONSISTENCY * statistics.median(abs(value - median) for value in seen)
        return (loss - median) / max(deviation, _DEVIATION_MIN * abs(median), 1e-12)

    def findings(self, loss: float, *, clean_step: int, now: float) -> list[Finding]:
        """The alarm that `loss` is, or none; one that is not finite is the screens' business.

        Args:
            loss: of the step that is being worked on.
            clean_step: newest step that is known to be clean.
            now: seconds since the Unix epoch.
        """
        ratio = self.score(loss) / self._factor if self.is_on and math.isfinite(loss) else 0.0
        if ratio <= 1:
            return []
        return [
            Finding(
                site="loss",
                layer=-1,
                check=Check.LOSS,
                kind=DetectionKind.LOSS_SPIKE,
                residual_ratio=ratio,
                detected_at=now,
                clean_step=clean_step,
            )
        ]
