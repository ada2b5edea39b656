"""Detections and decisions for TensorBoard, wandb, Comet or CSV files, by DeepSpeed's own monitor where that is on.

Called only where ranks compare notes about something that was seen: a clean step, and a run without a monitor, never
come here. Never here: a monitor of our own.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable
from typing import Any

from resilience.events import Decision, Detection, Verdict

__all__ = ["EngineMonitor", "monitor_of"]

DETECTIONS, DECISIONS, LOST = "Resilience/detections", "Resilience/decisions", "Resilience/lost_s"
"""Names of the series; the first two end with the site and the action."""


def monitor_of(engine: Any, rank: int) -> EngineMonitor | None:
    """What writes to the monitor of `engine`; None where that is off, and on all ranks but 0, as DeepSpeed has it."""
    monitor = getattr(engine, "monitor", None)
    return EngineMonitor(engine) if rank == 0 and monitor is not None and monitor.enabled else None


class EngineMonitor:
    """Writes to `engine.monitor`, a `deepspeed.monitor.monitor.MonitorMaster`. For rank 0.

    A point stands where DeepSpeed puts the learning rate of the same step: at the number of samples after it, which is
    step × train_batch_size as long as the batch has one size. wandb drops what is not in order of that number.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._seen: dict[str, Detection] = {}
        self._has_failed = False

    def gathered(self, detections: Iterable[Detection]) -> None:
        """What all ranks saw, before it is decided about."""
        self._seen |= {detection.detection_id: detection for detection in detections}

    def concluded(self, decision: Decision) -> None:
        """Write the decision, and the alarms since the last one that are no mere consequence of another."""
        verdicts = dict(decision.verdicts)
        roots = [
            each
            for each in self._seen.values()
            if each.caused_by is None and verdicts.get(each.detection_id) is not Verdict.PROPAGATED
        ]
        self._seen = {}
        num_alarms = Counter(detection.site for detection in roots)
        values = {f"{DETECTIONS}/{site}": float(num) for site, num in sorted(num_alarms.items())}
        values[f"{DECISIONS}/{decision.action}"] = 1.0
        if decision.lost_s > 0.0:
            values[LOST] = decision.lost_s
        self._write(values, decision.step)

    def _write(self, values: dict[str, float], step: int) -> None:
        engine = self._engine
        num_samples = engine.global_samples + (step - engine.global_steps) * engine.train_batch_size()
        try:
            engine.monitor.write_events([(name, value, num_samples) for name, value in values.items()])
        except OSError as error:
            # A full disk is no reason to stop between a decision and its execution. Said once.
            if not self._has_failed:
                print(f"resilience: DeepSpeed's monitor could not be written: {error}", file=sys.stderr, flush=True)
            self._has_failed = True
