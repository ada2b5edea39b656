"""What is written to DeepSpeed's monitor, where, and what it costs when the monitor is off or its disk is full."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest

from resilience.deepspeed.monitor import EngineMonitor, monitor_of
from resilience.events import Action, Check, Decision, Detection, DetectionKind, Verdict

Point = tuple[str, float, int]


class Written:
    """Stands in the place of DeepSpeed's `MonitorMaster`."""

    def __init__(self, *, enabled: bool = True) -> None:
        self.enabled = enabled
        self.points: list[Point] = []
        self.error: OSError | None = None

    def write_events(self, points: list[Point]) -> None:
        if self.error is not None:
            raise self.error
        self.points += points


def engine(monitor: Written, *, steps: int = 4, samples: int = 64) -> Any:
    return SimpleNamespace(monitor=monitor, global_steps=steps, global_samples=samples, train_batch_size=lambda: 16)


ALARM = Detection(
    detection_id="g1-r1-1",
    generation=1,
    step=5,
    micro_step=0,
    attempt=0,
    rank=1,
    node="a",
    device="cpu:a:1",
    site="linear.out",
    layer=3,
    check=Check.CHECKSUM,
    kind=DetectionKind.INF,
    residual_ratio=9.0,
)
DECISION = Decision(decision_id="g1-s5-a0", generation=1, step=5, attempt=0, action=Action.REPLAY, reason="an alarm")


def test_points_stand_at_the_samples_after_the_step_of_the_decision() -> None:
    written = Written()
    monitor = EngineMonitor(engine(written))
    monitor.gathered([ALARM, dataclasses.replace(ALARM, detection_id="g1-r0-1", rank=0)])
    monitor.concluded(dataclasses.replace(DECISION, lost_s=0.5))
    assert written.points == [
        ("Resilience/detections/linear.out", 2.0, 80),
        ("Resilience/decisions/replay", 1.0, 80),
        ("Resilience/lost_s", 0.5, 80),
    ]


def test_an_alarm_is_written_once_and_a_consequence_of_another_one_not_at_all() -> None:
    written = Written()
    monitor = EngineMonitor(engine(written))
    follower = dataclasses.replace(ALARM, detection_id="g1-r0-1", caused_by="g1-r1-1")
    blamed = dataclasses.replace(ALARM, detection_id="g1-r0-2", site="gradient")
    monitor.gathered([ALARM, follower, blamed])
    monitor.gathered([ALARM])
    monitor.concluded(dataclasses.replace(DECISION, verdicts=(("g1-r0-2", Verdict.PROPAGATED),)))
    monitor.concluded(dataclasses.replace(DECISION, action=Action.CONTINUE))
    assert [name for name, *_ in written.points] == [
        "Resilience/detections/linear.out",
        "Resilience/decisions/replay",
        "Resilience/decisions/continue",
    ]


def test_nothing_is_made_where_the_monitor_is_off_or_another_rank_writes() -> None:
    assert monitor_of(engine(Written(enabled=False)), 0) is None
    assert monitor_of(engine(Written()), 1) is None
    assert monitor_of(SimpleNamespace(), 0) is None
    assert monitor_of(engine(Written()), 0) is not None


def test_a_full_disk_is_told_once_and_stops_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    written = Written()
    written.error = OSError(28, "No space left on device")
    monitor = EngineMonitor(engine(written))
    monitor.concluded(DECISION)
    monitor.concluded(DECISION)
    assert capsys.readouterr().err.count("No space left on device") == 1
    written.error = None
    monitor.concluded(DECISION)
    assert len(written.points) == 1
