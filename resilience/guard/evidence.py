"""From findings to detections: identity, place, and which alarm is the cause of which. Pure.

Within one attempt on one rank the first alarm that was not mended is the root cause. What comes after it only
propagates it where its own inputs were bad already, or where it is an alarm about a gradient, since gradients are
computed from everything before them. Checks are local and come before the reduction, so no alarm crosses ranks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from resilience.abft.finding import Finding
from resilience.events import Check, Detection, DetectionKind, Verdict

__all__ = ["DetectionFactory", "is_root", "is_unmended", "scaler_will_skip"]

_NUM_PROPAGATED_MAX = 15
"""Propagated alarms kept for each attempt on a rank: one NaN reaches every parameter's gradient."""


@dataclasses.dataclass(slots=True)
class DetectionFactory:
    """Turns findings into detections of one rank in one generation."""

    generation: int
    rank: int
    node: str
    device: str
    num_made: int = 0

    def make(self, findings: Sequence[Finding], *, step: int, attempt: int) -> list[Detection]:
        """Detections for the findings of one attempt, in the order of execution, root causes linked.

        Args:
            findings: in the order in which the operations ran; gradients after the operations.
            step: the optimizer step.
            attempt: the execution of it.
        """
        made: list[Detection] = []
        root: Detection | None = None
        num_propagated = 0
        for finding in findings:
            cause = root.detection_id if root is not None and _propagates(finding) else None
            num_propagated += cause is not None
            if num_propagated > _NUM_PROPAGATED_MAX and cause is not None:
                continue
            detection = self._make(finding, step, attempt, cause)
            made.append(detection)
            if root is None and is_unmended(detection):
                root = detection
        return made

    def _make(self, finding: Finding, step: int, attempt: int, cause: str | None) -> Detection:
        self.num_made += 1
        return Detection(
            detection_id=f"g{self.generation}-r{self.rank}-{self.num_made}",
            generation=self.generation,
            step=step,
            micro_step=finding.micro_step,
            attempt=attempt,
            rank=self.rank,
            node=self.node,
            device=self.device,
            site=finding.site,
            layer=finding.layer,
            # A check of arithmetic whose inputs were bad has only screened them: the device is not to blame.
            check=Check.SCREEN if finding.inputs_bad else finding.check,
            kind=finding.kind,
            residual_ratio=finding.residual_ratio,
            verdict=Verdict.PENDING if cause is None else Verdict.PROPAGATED,
            mended=finding.mended,
            bit_exact=finding.bit_exact,
            caused_by=cause,
            param=finding.param,
            detected_at=finding.detected_at,
            latency_ms=finding.latency_ms,
        )


def is_unmended(detection: Detection) -> bool:
    """Whether the corruption is still in the gradients."""
    return not detection.mended


def is_root(detection: Detection) -> bool:
    """Whether it is a cause rather than a consequence."""
    return detection.caused_by is None


def scaler_will_skip(findings: Sequence[Finding | Detection]) -> bool:
    """Whether, while a dynamic loss scale is searched, these alarms are the loss scaler's business alone.

    They are when nothing but overflow was seen (INF or NaN, in gradients or on the way to them), it was not mended
    (the same call again overflowed again), and some local gradient is not finite, so that DeepSpeed skips the step.
    """
    unmended = [finding for finding in findings if not finding.mended]
    overflow = all(finding.kind in (DetectionKind.INF, DetectionKind.NAN) for finding in unmended)
    return overflow and any(finding.site == "gradient" and finding.check is Check.SCREEN for finding in unmended)


def _propagates(finding: Finding) -> bool:
    return not finding.mended and (finding.inputs_bad or finding.site == "gradient")
