"""report.json: what a run was, what struck it, what was seen and done. Written at the end, also of a failed run."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import platform
from pathlib import Path
from typing import Any

from resilience.coordinator.accounting import account
from resilience.coordinator.machine.state import State
from resilience.coordinator.memory_tier import snapshot_summary
from resilience.errors import ResilienceError
from resilience.events import Decision, Detection, Strike

__all__ = ["SCHEMA_VERSION", "as_report", "write_report"]

SCHEMA_VERSION = 1


def as_report(state: State, now: float) -> dict[str, Any]:
    """The report as plain data. Numbers that JSON lacks (infinite residuals) are null."""
    books = account(state, now)
    return {
        "schema_version": SCHEMA_VERSION,
        "run_id": state.run_id,
        "mode": str(state.mode),
        "versions": {"python": platform.python_version(), **state.versions},
        "config_digest": state.config_digest,
        "started_at": state.started_at,
        "finished_at": state.finished_at,
        "deterministic": state.deterministic,
        "outcome": state.outcome or "running",
        "exit_code": None if state.finished is None else state.finished.exit_code,
        "reason": "" if state.finished is None else state.finished.reason,
        "num_generations": len(state.generations),
        "generations": [dataclasses.asdict(generation) for generation in state.generations],
        "num_steps": state.newest_step,
        "last_verified_step": state.last_verified_step,
        "goodput_ratio": round(books.goodput_ratio, 6),
        "badput_s": {cause: round(seconds, 6) for cause, seconds in books.badput_s.items()},
        "faults_injected": [_strike(strike) for strike in sorted(state.strikes.values(), key=lambda s: s.struck_at)],
        "detections": [_detection(d) for d in state.detections.values() if d.caused_by is None],
        "propagated": [_detection(d) for d in state.detections.values() if d.caused_by is not None],
        "decisions": [_decision(d) for d in sorted(state.decisions.values(), key=lambda d: d.decided_at)],
        "snapshots": snapshot_summary(state, books.badput_s.get("snapshot", 0.0)),
        "checkpoints": [dataclasses.asdict(point) for point in state.checkpoints],
        "notes": [dataclasses.asdict(note) for note in state.notes],
    }


def write_report(state: State, path: Path, now: float) -> None:
    """Write the report to `path`, atomically.

    Raises:
        ResilienceError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(_finite(as_report(state, now)), indent=2, allow_nan=False) + "\n", "utf-8")
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise ResilienceError(f"report {path} cannot be written ({error.strerror}); is the disk full?") from None


def _strike(strike: Strike) -> dict[str, Any]:
    return dataclasses.asdict(strike)


def _detection(detection: Detection) -> dict[str, Any]:
    return dataclasses.asdict(detection)


def _decision(decision: Decision) -> dict[str, Any]:
    plain = dataclasses.asdict(decision)
    plain["verdicts"] = {name: str(verdict) for name, verdict in decision.verdicts}
    return plain


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
