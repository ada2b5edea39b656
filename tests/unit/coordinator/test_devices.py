"""The history of devices outlives jobs, and may be told the same thing twice."""

from __future__ import annotations

from pathlib import Path

import pytest

from resilience.coordinator.devices import DeviceHistory, DevicesError
from resilience.coordinator.machine.effects import RememberCordon, RememberFault
from resilience.events import Verdict


def fault(device: str, step: int, verdict: Verdict, at: float) -> RememberFault:
    return RememberFault(f"g1-s{step}", device, "a", verdict, at)


def test_faults_are_counted_once_over_jobs(tmp_path: Path) -> None:
    for run_id in ("one", "one", "two"):
        history = DeviceHistory(tmp_path / "devices.db")
        history.remember_fault(run_id, fault("gpu-1", 3, Verdict.TRANSIENT, 5.0))
        history.remember_fault(run_id, fault("gpu-1", 4, Verdict.PERSISTENT, 6.0))
        history.close()
    (record,) = DeviceHistory(tmp_path / "devices.db").records()
    assert (record.device, record.node, record.num_transient, record.num_persistent) == ("gpu-1", "a", 2, 2)
    assert (record.last_fault_at, record.cordoned) == (6.0, False)


def test_an_older_word_never_overrides_a_newer_one(tmp_path: Path) -> None:
    history = DeviceHistory(tmp_path / "devices.db")
    history.remember_cordon(RememberCordon("gpu-1", "a", True, "computes wrongly", 10.0))
    history.remember_cordon(RememberCordon("gpu-1", "a", False, "mended", 20.0))
    history.remember_cordon(RememberCordon("gpu-1", "a", True, "computes wrongly", 10.0))
    (record,) = history.records()
    assert (record.cordoned, record.reason) == (False, "")
    history.remember_cordon(RememberCordon("gpu-1", "a", True, "again", 30.0))
    assert history.records()[0].reason == "again"


def test_two_coordinators_share_it(tmp_path: Path) -> None:
    one, two = DeviceHistory(tmp_path / "devices.db"), DeviceHistory(tmp_path / "devices.db")
    one.remember_fault("one", fault("gpu-1", 3, Verdict.TRANSIENT, 5.0))
    two.remember_fault("two", fault("gpu-2", 3, Verdict.TRANSIENT, 5.0))
    assert [record.device for record in one.records()] == ["gpu-1", "gpu-2"] == [r.device for r in two.records()]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DevicesError, match="cannot be opened"):
        DeviceHistory(tmp_path / "file" / "devices.db")
