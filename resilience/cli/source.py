"""Where answers about a run come from: its coordinator, or, once that has ended, the journal that it left.

Both give the messages of the Operator service, so nothing that prints needs to know which one it was. What reads
journals is in `recorded`, and is imported only when there is one to read.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeVar

import grpc

from resilience.coordinator.paths import journal_path
from resilience.errors import CoordinatorUnreachableError, ResilienceError, UsageError
from resilience.rpc.codec import GRPC_OPTIONS
from resilience.rpc.tls import Tls, open_channel
from resilience.rpc.v1 import operator_pb2 as op
from resilience.rpc.v1 import operator_pb2_grpc as rpc

__all__ = ["LATEST_RUN", "Endpoint", "LiveSource", "Source", "open_source", "read_endpoint"]

LATEST_RUN = Path("resilience-runs") / "latest"
_CALL_S = 5.0
_ANSWER_S = 60.0
"""How long the ranks may take to answer an order."""
T = TypeVar("T")


class Source(Protocol):
    """What can be asked of a run, and the orders that can be given to it."""

    is_live: bool
    """Whether a coordinator answers; otherwise it is a journal, and nothing new will come."""

    def close(self) -> None: ...

    def run(self) -> op.Run: ...

    def ranks(self) -> op.ListRanksResponse: ...

    def detections(self, *, include_propagated: bool, limit: int) -> op.ListDetectionsResponse: ...

    def decisions(self, *, limit: int) -> op.ListDecisionsResponse: ...

    def explain(self, decision_id: str) -> op.Explanation: ...

    def checkpoints(self) -> op.ListCheckpointsResponse: ...

    def events(self, *, after: int, follow: bool) -> Iterator[op.Event]: ...

    def devices(self) -> op.ListDevicesResponse: ...

    def set_cordon(self, target: str, *, cordoned: bool, reason: str) -> op.SetCordonResponse: ...

    def drain(self, reason: str) -> None: ...

    def snapshots(self) -> op.ListSnapshotsResponse: ...

    def take_snapshot(self, reason: str) -> op.TakeSnapshotNowResponse: ...

    def rewind(self, reason: str, step: int | None) -> None: ...


@dataclasses.dataclass(frozen=True, slots=True)
class Endpoint:
    """What `coordinator.json` says."""

    address: str
    run_id: str
    token_file: Path | None
    metrics_address: str | None = None
    pid: int | None = None
    tls: Tls | None = None


def read_endpoint(run_dir: Path) -> Endpoint | None:
    """The coordinator of the run in `run_dir`; None if there is no such file.

    Raises:
        ResilienceError: the file is damaged.
    """
    path = run_dir / "coordinator.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        token = content["token_file"]
        return Endpoint(
            address=content["address"],
            run_id=content["run_id"],
            token_file=None if token is None else Path(token),
            metrics_address=content.get("metrics_address"),
            pid=content.get("pid"),
            tls=Tls.from_told(content.get("tls")),
        )
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ResilienceError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError):
        raise ResilienceError(f"{path}: is not what a launcher wrote; give --address") from None


def open_source(address: str | None, token_file: Path | None, run_dir: Path | None, *, quiet: bool = False) -> Source:
    """Find who can answer.

    Args:
        address: `host:port` of a coordinator; None takes the one of the run in `run_dir`.
        token_file: file with its token; None takes that run's.
        run_dir: the run; None takes `./resilience-runs/latest`.
        quiet: say nothing on standard error when a journal answers.

    Raises:
        CoordinatorUnreachableError: nobody can.
        UsageError: there is no such run, or the token cannot be read.
    """
    chosen = run_dir or LATEST_RUN
    endpoint = read_endpoint(chosen)
    if address is None and endpoint is None:
        raise UsageError(
            f"{chosen}: no run there (no coordinator.json); give --run-dir DIR or --address HOST:PORT, "
            "or start here a run with deepspeed --resilience"
        )
    if address is not None and (endpoint is None or endpoint.address != address):
        return LiveSource(address, token_file)
    assert endpoint is not None
    live = LiveSource(endpoint.address, token_file or endpoint.token_file, endpoint.tls)
    if address is not None or live.answers():
        return live
    live.close()
    return _recorded(chosen, endpoint, quiet)


def _recorded(run_dir: Path, endpoint: Endpoint, quiet: bool) -> Source:
    for path in (run_dir / "journal.db", journal_path(os.environ, endpoint.run_id)):
        if path.is_file():
            if not quiet:
                print(
                    f"resilience: the coordinator at {endpoint.address} has ended; "
                    f"answering read-only from {os.path.relpath(path)}",
                    file=sys.stderr,
                )
            from resilience.cli.recorded import RecordedSource

            return RecordedSource(path)
    raise CoordinatorUnreachableError(
        f"coordinator {endpoint.address} of run {endpoint.run_id} does not answer and left no journal in {run_dir}; "
        "is it running on this network?"
    )


class LiveSource:
    """A running coordinator."""

    is_live = True

    def __init__(self, address: str, token_file: Path | None, tls: Tls | None = None) -> None:
        self.address = address
        # A coordinator tells which certificates it was given; whoever has others says so in the environment.
        self._channel = open_channel(address, Tls.from_environment(os.environ) or tls, GRPC_OPTIONS)
        self._stub = rpc.OperatorStub(self._channel)
        self._metadata = _credentials(token_file)

    def close(self) -> None:
        self._channel.close()

    def answers(self) -> bool:
        """Whether somebody listens there, if only to refuse."""
        try:
            self.run()
        except CoordinatorUnreachableError:
            return False
        return True

    def run(self) -> op.Run:
        return self._call(self._stub.GetRun, op.GetRunRequest(), op.Run)

    def ranks(self) -> op.ListRanksResponse:
        return self._call(self._stub.ListRanks, op.ListRanksRequest(), op.ListRanksResponse)

    def detections(self, *, include_propagated: bool, limit: int) -> op.ListDetectionsResponse:
        request = op.ListDetectionsRequest(include_propagated=include_propagated, limit=limit)
        return self._call(self._stub.ListDetections, request, op.ListDetectionsResponse)

    def decisions(self, *, limit: int) -> op.ListDecisionsResponse:
        return self._call(self._stub.ListDecisions, op.ListDecisionsRequest(limit=limit), op.ListDecisionsResponse)

    def explain(self, decision_id: str) -> op.Explanation:
        return self._call(
            self._stub.ExplainDecision, op.ExplainDecisionRequest(decision_id=decision_id), op.Explanation
        )

    def checkpoints(self) -> op.ListCheckpointsResponse:
        return self._call(self._stub.ListCheckpoints, op.ListCheckpointsRequest(), op.ListCheckpointsResponse)

    def events(self, *, after: int, follow: bool) -> Iterator[op.Event]:
        request = op.StreamEventsRequest(after_sequence=after, follow=follow)
        try:
            yield from self._stub.StreamEvents(request, metadata=self._metadata, timeout=None if follow else _CALL_S)
        except grpc.RpcError as error:
            raise _explained(error, self.address) from None

    def devices(self) -> op.ListDevicesResponse:
        return self._call(self._stub.ListDevices, op.ListDevicesRequest(), op.ListDevicesResponse)

    def set_cordon(self, target: str, *, cordoned: bool, reason: str) -> op.SetCordonResponse:
        return self._call(
            self._stub.SetCordon,
            op.SetCordonRequest(target=target, cordoned=cordoned, reason=reason),
            op.SetCordonResponse,
        )

    def drain(self, reason: str) -> None:
        self._call(self._stub.DrainRun, op.DrainRunRequest(reason=reason), op.DrainRunResponse)

    def snapshots(self) -> op.ListSnapshotsResponse:
        return self._call(self._stub.ListSnapshots, op.ListSnapshotsRequest(), op.ListSnapshotsResponse)

    def take_snapshot(self, reason: str) -> op.TakeSnapshotNowResponse:
        request = op.TakeSnapshotNowRequest(reason=reason, wait_s=_ANSWER_S)
        return self._call(self._stub.TakeSnapshotNow, request, op.TakeSnapshotNowResponse, wait_s=_ANSWER_S)

    def rewind(self, reason: str, step: int | None) -> None:
        self._call(self._stub.RewindRun, op.RewindRunRequest(reason=reason, step=step), op.RewindRunResponse)

    def _call(self, method: Callable[..., Any], request: Any, kind: type[T], *, wait_s: float = 0.0) -> T:
        try:
            answer = method(request, metadata=self._metadata, timeout=_CALL_S + wait_s)
        except grpc.RpcError as error:
            raise _explained(error, self.address) from None
        assert isinstance(answer, kind)
        return answer


def _credentials(token_file: Path | None) -> tuple[tuple[str, str], ...]:
    if token_file is None:
        return ()
    try:
        return (("authorization", f"Bearer {token_file.read_text(encoding='ascii').strip()}"),)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not ASCII"
        raise UsageError(f"{token_file}: token cannot be read ({reason}); give --token-file FILE") from None


_REFUSED = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)
_SILENT = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED)


def _explained(error: grpc.RpcError, address: str) -> ResilienceError:
    code, details = error.code(), error.details() or ""
    if code in _SILENT:
        return CoordinatorUnreachableError(
            f"coordinator {address} does not answer; is it running, and the address right?"
        )
    if code in _REFUSED:
        return UsageError(f"coordinator {address} refused: {details}; give --token-file FILE of its run directory")
    if code is grpc.StatusCode.INVALID_ARGUMENT:
        return UsageError(f"coordinator {address} refused: {details}")
    if code is grpc.StatusCode.NOT_FOUND:
        return ResilienceError(details)
    return ResilienceError(f"coordinator {address}: {details} ({code.name})")
