"""A journal as the source of answers, for runs whose coordinator has ended. Reads only, but for the device history."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from resilience.clock import SystemClock
from resilience.coordinator import queries
from resilience.coordinator.devices import DeviceHistory
from resilience.coordinator.journal import open_recorded
from resilience.coordinator.machine.effects import RememberCordon
from resilience.coordinator.paths import devices_path
from resilience.errors import ResilienceError
from resilience.rpc.v1 import operator_pb2 as op

__all__ = ["RecordedSource"]


class RecordedSource:
    """A journal. Reads only, but for the history of devices, which outlives every run."""

    is_live = False

    def __init__(self, path: Path) -> None:
        self._path = path
        recorded = open_recorded(path)
        self._machine, self._last_at = recorded.machine, recorded.last_at

    def close(self) -> None:
        """Nothing is open."""

    def run(self) -> op.Run:
        return queries.get_run(self._machine, now=self._last_at)

    def ranks(self) -> op.ListRanksResponse:
        return queries.list_ranks(self._machine, now=self._last_at)

    def detections(self, *, include_propagated: bool, limit: int) -> op.ListDetectionsResponse:
        return queries.list_detections(self._machine.state, include_propagated=include_propagated, limit=limit)

    def decisions(self, *, limit: int) -> op.ListDecisionsResponse:
        return queries.list_decisions(self._machine.state, limit=limit)

    def explain(self, decision_id: str) -> op.Explanation:
        found = queries.explain_decision(self._machine.state, decision_id)
        if found is None:
            raise ResilienceError(f"{decision_id}: no such decision in {self._path}; see `resilience decisions`")
        return found

    def checkpoints(self) -> op.ListCheckpointsResponse:
        return queries.list_checkpoints(self._machine.state)

    def events(self, *, after: int, follow: bool) -> Iterator[op.Event]:
        del follow  # nothing new will come
        yield from queries.events_after(self._machine.state, after)

    def devices(self) -> op.ListDevicesResponse:
        history = DeviceHistory(devices_path(os.environ))
        try:
            return queries.list_devices(self._machine.state, history.records())
        finally:
            history.close()

    def set_cordon(self, target: str, *, cordoned: bool, reason: str) -> op.SetCordonResponse:
        known = [device for device in self.devices().devices if target in (device.device, device.node)]
        if not known:
            raise ResilienceError(f"{target}: no such device or node in this run; see `resilience devices`")
        changed = [device for device in known if device.cordoned != cordoned]
        history = DeviceHistory(devices_path(os.environ))
        try:
            for device in changed:
                cordon = RememberCordon(
                    device=device.device, node=device.node, cordoned=cordoned, reason=reason, at=SystemClock().wall()
                )
                history.remember_cordon(cordon)
        finally:
            history.close()
        return op.SetCordonResponse(devices=[device.device for device in changed])

    def drain(self, reason: str) -> None:
        del reason
        raise ResilienceError("the run has ended: there is nothing to drain")

    def snapshots(self) -> op.ListSnapshotsResponse:
        return op.ListSnapshotsResponse()  # they are gone with the run

    def take_snapshot(self, reason: str) -> op.TakeSnapshotNowResponse:
        del reason
        raise ResilienceError("the run has ended: there is nothing to take a snapshot of")

    def rewind(self, reason: str, step: int | None) -> None:
        del reason, step
        raise ResilienceError("the run has ended: there is nothing to rewind")
