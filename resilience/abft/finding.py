"""What a check hands to the guard: an alarm inside one process, before it has a rank, a step or an identity."""

from __future__ import annotations

import dataclasses

from resilience.events import Check, DetectionKind

__all__ = ["Finding"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One alarm. The guard turns it into a `resilience.events.Detection`."""

    site: str
    """`attention.scores`, `linear.wgrad`, `gradient`, …"""
    layer: int
    """Which call of that site in the forward order of this micro-step; −1 where it has no meaning."""
    check: Check
    kind: DetectionKind
    residual_ratio: float
    """Residual ÷ threshold; infinite when the residual is not finite."""
    mended: bool = False
    """Repaired in place and verified again."""
    bit_exact: bool = False
    """The repair equals the fault-free result bit for bit."""
    inputs_bad: bool = False
    """The operation's inputs were not finite already: this alarm only propagates an earlier one."""
    param: str | None = None
    micro_step: int = 0
    """Micro-batch of the step in which it was seen, from 0."""
    detected_at: float = 0.0
    """Seconds since the Unix epoch."""
    latency_ms: float = 0.0
    clean_step: int | None = None
    """Where state is wrong: newest step whose snapshot cannot hold what was found; None where that is not known."""
