"""What happens around one protected operation: label, run, strike, check, mend, record.

One class a family of operators. The arithmetic is in `checksum.py`, `probabilities.py` and `invariants.py`; how an operation is
reached is in `seam.py`. On a CPU the check is read at once, and a faulty operation is run again in place. On any other device
nothing is read: the result of the check goes to the record as a tensor, and a fault is repaired by a replay of the step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from resilience.abft import checksum
from resilience.abft.gemm import Gemm, parse_gemm
from resilience.abft.labels import Label, Labels
from resilience.abft.mend import repeat_until_clean, restore_overwritten
from resilience.abft.record import Record
from resilience.abft.seam import Handler, Original
from resilience.abft.thresholds import UNCONFIRMED, classify
from resilience.config import DetectionConfig
from resilience.events import Check

__all__ = ["GemmHandlers", "Injector"]


class Injector(Protocol):
    """What `resilience.faults.tensor.TensorInjector` offers here."""

    @property
    def armed(self) -> bool:
        """Whether any fault is addressed to this micro-step."""

    def strike(self, site: str, layer: int, tensor: torch.Tensor, call: int = 0) -> bool:
        """Corrupt `tensor` in place if the fault plan says so at this address."""


class GemmHandlers:
    """Checksums around matrix products."""

    def __init__(self, config: DetectionConfig, labels: Labels, record: Record, injector: Injector | None) -> None:
        self._scale = config.threshold_scale
        self._max_mends = config.max_mends
        self._labels = labels
        self._record = record
        self._injector = injector
        self.sums = checksum.WeightSums()

    def handler(self, operator: str) -> Handler:
        """The handler of one of `gemm.GEMM_OPERATORS`."""

        def handle(original: Original, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            gemm = parse_gemm(operator, args, kwargs)
            if gemm is None:
                return original(*args, **kwargs)
            label = self._labels.gemm(gemm)
            injector = self._injector

            def run() -> torch.Tensor:
                out: torch.Tensor = original(*args, **kwargs)
                if injector is not None and injector.armed:
                    injector.strike(label.site, label.layer, out)
                return out

            out = run()
            if not self._record.due(label.site):
                return out
            with self._record.timed() as started:
                return self._check(label, gemm, out, run, started)

        return handle

    def _check(
        self, label: Label, gemm: Gemm, out: torch.Tensor, run: Callable[[], torch.Tensor], started: float
    ) -> torch.Tensor:
        if out.device.type != "cpu":
            ratio = checksum.screen(gemm, out, self.sums, factor_scale=self._scale * UNCONFIRMED)
            self._record.defer(label, Check.CHECKSUM, checksum.deferred_result(gemm, ratio))
            return out
        ratio = checksum.screen(gemm, out, self.sums, factor_scale=self._scale)
        worst = float(ratio.max())
        if worst <= 1.0:
            self._record.clean(worst)
            return out
        # A parameter that changed without a new version would make its cached sums stale.
        self.sums.discard(gemm.right)
        confirmation = checksum.confirm(gemm, out, ratio, tolerance_scale=self._scale)
        if confirmation.kind is not None:
            mended = self._mend(gemm, run)
            self._record.alarm(
                label, Check.CHECKSUM, confirmation.kind, worst, started, mended=mended is not None
            )
            return out if mended is None else mended
        if confirmation.inputs_bad:
            kind = classify(checksum.extreme(out), torch.finfo(out.dtype).max)
            self._record.alarm(label, Check.CHECKSUM, kind, worst, started, inputs_bad=True)
        return out

    def _mend(self, gemm: Gemm, run: Callable[[], torch.Tensor]) -> torch.Tensor | None:
        """The result of the same call again, verified; None if it cannot be repeated or stays faulty."""

        def again() -> torch.Tensor:
            restore_overwritten(gemm)
            return run()

        def clean(result: torch.Tensor) -> bool:
            ratio = checksum.screen(gemm, result, self.sums, factor_scale=self._scale)
            return float(ratio.max()) <= 1.0 or checksum.confirm(gemm, result, ratio, tolerance_scale=self._scale).kind is None

        return repeat_until_clean(again, clean, max_mends=self._max_mends if gemm.repeatable else 0)
