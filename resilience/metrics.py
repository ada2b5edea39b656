"""Every metric in one table: name, type, labels, unit, help, buckets. Data only; `coordinator.scrape` serves it.

Labels come from bounded sets (rank, device, site, kind, verdict, action, outcome, cause, tier, method), never a step.
Every sample also carries the label `run`. Counters and histograms are read off the journaled state, so that they never
go back when the coordinator is killed and recovers; they are as old as the newest sample of the heartbeats.
"""

from __future__ import annotations

import dataclasses
import enum

__all__ = ["BY_NAME", "METRICS", "PREFIX", "Kind", "Metric", "as_markdown", "bucket_of"]

PREFIX = "resilience_"

_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
_STEP_SECONDS = (0.01, 0.03, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)
_RATIOS = (1e-4, 1e-3, 1e-2, 0.03, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 1.0)


class Kind(enum.StrEnum):
    """Prometheus types."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One row; `name` is without the prefix."""

    name: str
    kind: Kind
    help: str
    unit: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    """Upper bounds, without +Inf."""


def _counter(name: str, help_text: str, unit: str = "", *labels: str) -> Metric:
    return Metric(name=name, kind=Kind.COUNTER, help=help_text, unit=unit, labels=labels)


def _gauge(name: str, help_text: str, unit: str = "", *labels: str) -> Metric:
    return Metric(name=name, kind=Kind.GAUGE, help=help_text, unit=unit, labels=labels)


def _histogram(name: str, help_text: str, unit: str, buckets: tuple[float, ...], *labels: str) -> Metric:
    return Metric(name=name, kind=Kind.HISTOGRAM, help=help_text, unit=unit, labels=labels, buckets=buckets)


METRICS: tuple[Metric, ...] = (
    _gauge("goodput_ratio", "Share of the run's lifetime spent on steps that were kept", "ratio"),
    _counter("badput_seconds_total", "Lifetime not spent on steps that were kept, by cause", "seconds", "cause"),
    _counter("steps_total", "Optimizer steps taken by rank 0, repeated ones included", "steps"),
    _histogram("step_seconds", "Duration of an optimizer step, of all ranks", "seconds", _STEP_SECONDS),
    _counter("detections_total", "Root causes detected", "detections", "site", "kind", "verdict"),
    _histogram("detection_latency_seconds", "From the end of a faulty operation to its alarm", "seconds", _SECONDS),
    _counter(
        "corrections_total",
        "Alarms of checks of arithmetic and of state at rest, by whether they were mended in place",
        "",
        "outcome",
    ),
    _counter("replays_total", "Iterations that were run again", "", "outcome"),
    _counter("rewinds_total", "Times that the run went back to a memory snapshot in its live processes", "", "outcome"),
    _counter("restores_total", "Snapshots and checkpoints loaded or refused", "", "tier", "outcome"),
    _histogram(
        "snapshot_seconds", "Memory snapshots: copy (blocking), parity, load, flush", "seconds", _SECONDS, "phase"
    ),
    _gauge("snapshot_age_steps", "Steps since the newest memory snapshot", "steps"),
    _counter("decisions_total", "Decisions, by the rung they chose", "decisions", "action"),
    _histogram(
        "decision_seconds", "From the first detection to the end of the decision's execution", "seconds", _SECONDS
    ),
    _counter("abft_checks_total", "Protected operations that were checked, of all ranks", "checks", "site"),
    _histogram("abft_residual_ratio", "Residual / threshold of clean checks, a sample", "ratio", _RATIOS),
    _gauge("abft_overhead_ratio", "Time in checks / time of the step, where sampled", "ratio", "rank"),
    _counter("false_positives_total", "Detections that proved to be no fault", "detections"),
    _gauge("heartbeat_age_seconds", "Seconds since a rank's last heartbeat", "seconds", "rank"),
    _gauge("last_verified_step", "Newest step known to be clean", "steps", "tier"),
    _gauge("generation", "Current generation", ""),
    _counter("device_faults_total", "Settled faults of a device in this run", "faults", "device", "verdict"),
    _gauge("quarantined", "1 while a device is out of use", "", "device"),
    _gauge("device_info", "1 for each device that is offered or out of use: where it is", "", "device", "node"),
    _gauge("retry_budget_remaining", "Restarts left in the window", "restarts"),
    _gauge("coordinator_up", "1 while the coordinator serves", ""),
    _histogram("rpc_seconds", "Time to answer a call", "seconds", _SECONDS, "method"),
)

BY_NAME = {metric.name: metric for metric in METRICS}


def bucket_of(metric: Metric, value: float) -> int:
    """Index of the bucket that `value` falls into; the last one, after all bounds, is +Inf."""
    return next((index for index, bound in enumerate(metric.buckets) if value <= bound), len(metric.buckets))


def as_markdown() -> str:
    """The table as Markdown."""
    lines = ["| metric | type | labels | unit | what it says |", "|---|---|---|---|---|"]
    for m in METRICS:
        labels = ", ".join(("run", *m.labels))
        lines.append(f"| `{PREFIX}{m.name}` | {m.kind} | {labels} | {m.unit or '–'} | {m.help} |")
    return "\n".join(lines) + "\n"
