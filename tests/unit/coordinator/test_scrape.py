"""Every row of the table is served, fed by the state, with the labels that the table names."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from resilience.coordinator.machine import commands as c
from resilience.coordinator.scrape import families
from resilience.events import Action, CheckpointFact, CheckpointKind, Decision, Outcome, SnapshotFact, SnapshotKind
from resilience.metrics import METRICS, PREFIX, Kind
from resilience.testing import FakeRun

Values = dict[tuple[str, tuple[tuple[str, str], ...]], float]


class Fixed(Collector):
    """Serves what the run shows now."""

    def __init__(self, run: FakeRun) -> None:
        self._run = run

    def collect(self):  # type: ignore[no-untyped-def]  # prometheus_client has no name for it
        return families(self._run.machine, self._run.clock.wall())


def scraped(run: FakeRun) -> Values:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(Fixed(run))
    text = generate_latest(registry).decode()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(found: Values, name: str, **labels: str) -> float:
    return found[PREFIX + name, tuple(sorted({"run": "run", **labels}.items()))]


@pytest.fixture
def busy() -> FakeRun:
    """A run with something of everything."""
    run = FakeRun()
    run.start()
    run.script.at(step=2, rank=1).alarms(times=1)
    run.script.at(step=3, rank=0).alarms(times=1, mended=True)
    run.train(until=4)
    points = [
        CheckpointFact(
            kind=kind, directory="d", tag=f"t{at}", step=4, generation=1, last_verified_step=4, seconds=2.0, at=at
        )
        for at, kind in enumerate((CheckpointKind.PUBLISHED, CheckpointKind.REFUSED), start=1)
    ]
    run.report("rank:0", checkpoints=tuple(points))
    run.report(
        "rank:0",
        heartbeat=c.Heartbeat(
            step=4,
            checks=(("linear.out", 9),),
            residual_ratios=(0.02, float("nan")),
            abft_overhead_ratio=0.1,
            snapshot_seconds_since=(0.1,),
        ),
        badput_seconds=(("snapshot", 0.1),),
    )
    told = [
        SnapshotFact(kind=kind, step=3, generation=1, node="a", num_bytes=100, clean_through=3, seconds=0.1, at=5.0)
        for kind in (SnapshotKind.TAKEN, SnapshotKind.PROTECTED, SnapshotKind.FLUSHED, SnapshotKind.LOADED)
    ]
    run.report("rank:0", snapshots=tuple(told))
    back = Decision(
        decision_id="g1-s4-a1",
        generation=1,
        step=4,
        attempt=1,
        action=Action.REWIND,
        reason="",
        outcome=Outcome.SUCCEEDED,
    )
    run.conclude(back)
    run.submit(c.ObserveRpc(method="Decide", seconds=0.002))
    run.submit(c.SetCordon(target="device-1", cordoned=True, reason="hot"))
    run.pass_time(1.25)
    run.restart(from_step=4, exits=[run.exit_of(1, -9)])
    return run


def test_every_row_is_fed(busy: FakeRun) -> None:
    found = scraped(busy)
    for row in METRICS:
        name = PREFIX + row.name + ("_count" if row.kind is Kind.HISTOGRAM else "")
        samples = [labels for served, labels in found if served == name]
        assert samples, f"{name} is never fed"
        assert all({key for key, _ in labels} == {"run", *row.labels} for labels in samples), name


def test_values(busy: FakeRun) -> None:
    found = scraped(busy)
    assert value(found, "steps_total") == 4
    assert value(found, "step_seconds_count") == 8, "of both ranks"
    assert value(found, "step_seconds_bucket", le="1.0") == 8
    assert value(found, "detections_total", site="linear.out", kind="mismatch", verdict="transient") == 2
    assert value(found, "corrections_total", outcome="succeeded") == 1
    assert value(found, "corrections_total", outcome="failed") == 1
    assert value(found, "replays_total", outcome="succeeded") == 1
    assert value(found, "restores_total", tier="disk", outcome="refused") == 1
    assert value(found, "restores_total", tier="memory", outcome="succeeded") == 1
    assert value(found, "rewinds_total", outcome="succeeded") == 1
    assert value(found, "snapshot_age_steps") == 1
    for phase in ("copy", "protect", "load", "flush"):
        assert value(found, "snapshot_seconds_count", phase=phase) == 1, phase
    assert value(found, "badput_seconds_total", cause="snapshot") == 0.05, "the share of one of two ranks"
    assert value(found, "last_verified_step", tier="memory") == 3
    assert value(found, "abft_checks_total", site="linear.out") == 9
    assert value(found, "abft_residual_ratio_count") == 1, "what is not finite is left out"
    assert value(found, "last_verified_step", tier="checkpoint") == 4
    assert value(found, "device_faults_total", device="device-1", verdict="transient") == 1
    assert value(found, "quarantined", device="device-1") == 1
    assert value(found, "quarantined", device="device-0") == 0
    places = {labels for name, labels in found if name == f"{PREFIX}device_info"}
    assert {dict(labels)["device"] for labels in places} == {"device-0", "device-1"}
    assert all(dict(labels)["node"] for labels in places)
    assert value(found, "retry_budget_remaining") == 2
    assert value(found, "badput_seconds_total", cause="checkpoint_save") == 2.0
    assert value(found, "rpc_seconds_count", method="Decide") == 1
    assert value(found, "coordinator_up") == 1


def test_counters_are_the_same_after_recovery(busy: FakeRun) -> None:
    before = scraped(busy)
    busy.restart_coordinator()
    after = scraped(busy)
    volatile = ("heartbeat_age_seconds", "abft_overhead_ratio", "goodput_ratio", "snapshot_age_steps")
    kept = {key: number for key, number in before.items() if not key[0].startswith(tuple(PREFIX + v for v in volatile))}
    assert {key: after.get(key) for key in kept} == kept
