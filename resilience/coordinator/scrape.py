"""Prometheus in front of the state: the table of `resilience.metrics`, filled in at each scrape."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from resilience.coordinator import queries
from resilience.coordinator.accounting import account, settled_badput_s
from resilience.coordinator.machine import Machine
from resilience.coordinator.machine.ledger import blames_a_device
from resilience.coordinator.machine.snapshots import CLEAN, newest_steps
from resilience.coordinator.machine.state import Histogram, State
from resilience.coordinator.memory_tier import num_restores
from resilience.events import Action, Check, Detection, Mode, Outcome, Verdict
from resilience.metrics import METRICS, PREFIX, Kind
from resilience.metrics import Metric as Row
from resilience.policy import Tier, restarts_left

__all__ = ["families", "samples"]

Samples = Mapping[tuple[str, ...], float]

_MENDING = frozenset({Check.CHECKSUM, Check.INVARIANT, Check.AT_REST, Check.REPLICA})


def samples(machine: Machine, now: float) -> dict[str, Samples]:
    """Counters and gauges: metric -> label values -> value. Label values are in the order of the table."""
    state, beats = machine.state, machine.pulse.beats
    roots = [d for d in state.detections.values() if d.caused_by is None]
    counted = collections.Counter
    ages = {rank: machine.pulse.age(f"rank:{rank}", now) for rank, seat in state.seats.items() if seat.left is None}
    overheads = {rank: beat.abft_overhead_ratio for rank, beat in beats.items()}
    cordoned = {device.device: 0.0 for node in state.nodes.values() for device in node.agent.devices}
    cordoned.update(dict.fromkeys(state.cordons, 1.0))
    decisions = state.decisions.values()
    return {
        "goodput_ratio": {(): account(state, now).goodput_ratio},
        "badput_seconds_total": {(cause,): seconds for cause, seconds in settled_badput_s(state).items()},
        "steps_total": {(): state.telemetry.num_steps_taken},
        "detections_total": counted((d.site, str(d.kind), str(d.verdict)) for d in roots if _is_closed(state, d)),
        "corrections_total": counted(
            ("succeeded" if d.mended else "failed",) for d in roots if d.check in _MENDING or d.mended
        ),
        "replays_total": counted(
            (str(d.outcome),) for d in decisions if d.action is Action.REPLAY and d.outcome is not Outcome.PENDING
        ),
        "rewinds_total": counted(
            (str(d.outcome),) for d in decisions if d.action is Action.REWIND and d.outcome is not Outcome.PENDING
        ),
        "restores_total": num_restores(state),
        "decisions_total": counted((str(d.action),) for d in decisions),
        "abft_checks_total": {(site,): count for site, count in state.telemetry.checks.items()},
        "abft_overhead_ratio": {(str(rank),): ratio for rank, ratio in overheads.items() if ratio is not None},
        "false_positives_total": {(): sum(1 for d in roots if d.verdict is Verdict.FALSE_POSITIVE)},
        "heartbeat_age_seconds": {(str(rank),): max(0.0, age) for rank, age in ages.items()},
        "last_verified_step": _last_verified(state),
        "snapshot_age_steps": _snapshot_age(machine),
        "generation": {(): state.generation},
        "device_faults_total": counted((device, verdict) for device, verdict, *_ in _device_faults(roots)),
        "quarantined": {(device,): value for device, value in cordoned.items()},
        "device_info": dict.fromkeys(_places(state).items(), 1.0),
        "retry_budget_remaining": {(): restarts_left(state.failures, state.limits, now=now)},
        "coordinator_up": {(): 1.0},
    }


def _places(state: State) -> dict[str, str]:
    """Device → its node, of all that are offered and of those out of use, wherever they were seen last."""
    found = {device: cordon.node for device, cordon in state.cordons.items()}
    return found | {device.device: name for name, node in state.nodes.items() for device in node.agent.devices}


def _is_closed(state: State, detection: Detection) -> bool:
    """Whether the verdict stands. One that is still open would move from one label to another: a counter that falls."""
    return detection.verdict is not Verdict.PENDING or state.finished is not None or state.mode is Mode.SHADOW


def _device_faults(roots: Iterable[Detection]) -> set[tuple[str, str, int, int]]:
    """(device, verdict, generation, step): alarms of one device in one step are one fault."""
    hardware = (Verdict.TRANSIENT, Verdict.PERSISTENT)
    return {
        (d.device, str(d.verdict), d.generation, d.step) for d in roots if d.verdict in hardware and blames_a_device(d)
    }


def _snapshot_age(machine: Machine) -> Samples:
    """Steps since the newest memory snapshot that the run could go back to; nothing where there is none."""
    newest = newest_steps(machine.state, machine.pulse.snapshots).get(Tier.MEMORY)
    return {} if newest is None else {(): max(0, queries.newest_step(machine) - newest)}


def _last_verified(state: State) -> Samples:
    """Tiers without anything that is known to be clean are left out, but for the checkpoints."""
    steps = {"live": state.last_verified_step, "checkpoint": state.newest_checkpoint_step}
    if CLEAN in state.snapshot_steps:
        steps["memory"] = state.snapshot_steps[CLEAN]
    return {(tier,): step for tier, step in steps.items()}


def families(machine: Machine, now: float) -> Iterator[Metric]:
    """Every row of the table, filled in."""
    run = machine.state.run_id
    found = samples(machine, now)
    for row in METRICS:
        labels = ("run", *row.labels)
        if row.kind is Kind.HISTOGRAM:
            yield _histogram(row, run, labels, machine.state.telemetry.histograms)
            continue
        family = CounterMetricFamily if row.kind is Kind.COUNTER else GaugeMetricFamily
        metric = family(PREFIX + row.name, row.help, labels=labels)
        for values, number in sorted(found[row.name].items()):
            metric.add_metric([run, *values], float(number))
        yield metric


def _histogram(
    row: Row, run: str, labels: tuple[str, ...], histograms: Mapping[tuple[str, str], Histogram]
) -> HistogramMetricFamily:
    metric = HistogramMetricFamily(PREFIX + row.name, row.help, labels=labels)
    found = {label: histogram for (name, label), histogram in histograms.items() if name == row.name}
    if not row.labels:
        found.setdefault("", Histogram([0] * (len(row.buckets) + 1)))
    for label, histogram in sorted(found.items()):
        cumulative, buckets = 0, []
        for bound, count in zip([*map(str, row.buckets), "+Inf"], histogram.counts, strict=True):
            cumulative += count
            buckets.append((bound, cumulative))
        metric.add_metric([run, label] if row.labels else [run], buckets, histogram.total)
    return metric
