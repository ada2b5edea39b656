"""How launchers and agents talk to the coordinator: deadlines, retries, and a report stream that heals itself.

A coordinator that is silent must never end healthy ranks: the report stream only ever passes on orders that it was
given, and a call that is not answered is tried again for as long as its caller wants.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import grpc

from resilience.clock import Clock, SystemClock
from resilience.context import RunContext
from resilience.errors import CoordinatorUnreachableError, ResilienceError, UsageError
from resilience.events import RankExit, SnapshotFact
from resilience.rpc import codec
from resilience.rpc.tls import Tls, open_channel
from resilience.rpc.v1 import coordinator_pb2 as pb
from resilience.rpc.v1 import coordinator_pb2_grpc as rpc
from resilience.rpc.v1 import operator_pb2 as op
from resilience.rpc.v1.operator_pb2_grpc import OperatorStub

__all__ = ["CoordinatorClient", "ReportStream", "credentials", "is_reachable"]

_BACKOFF_S = (0.1, 0.2, 0.5, 1.0, 2.0)
_CALL_S = 10.0
_TRY_AGAIN = frozenset(
    {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED, grpc.StatusCode.ABORTED}
)
_CHANNEL_OPTIONS = (
    *codec.GRPC_OPTIONS,
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.initial_reconnect_backoff_ms", 100),
)


def is_reachable(address: str, *, timeout_s: float, tls: Tls | None = None) -> bool:
    """Whether a gRPC server answers at `address` within `timeout_s`, and each side takes the other's certificate."""
    with open_channel(address, tls, _CHANNEL_OPTIONS) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=timeout_s)
        except grpc.FutureTimeoutError:
            return False
    return True


class CoordinatorClient:
    """Calls of one launcher or agent. Safe to use from several threads."""

    def __init__(self, context: RunContext, *, clock: Clock | None = None) -> None:
        self.run_id = context.run_id
        self.address = context.coordinator_address
        self._clock = clock or SystemClock()
        self._channel = open_channel(self.address, Tls.of(context.config.coordinator), _CHANNEL_OPTIONS)
        self.stub = rpc.CoordinatorStub(self._channel)
        self._operator = OperatorStub(self._channel)
        self.metadata = credentials(context.token_file)

    def close(self) -> None:
        self._channel.close()

    def join(
        self, agent: pb.AgentInfo, *, wait_s: float, patience_s: float, interrupted: Callable[[], None]
    ) -> pb.JoinResponse:
        """Ask for a place until there is one, or until the run is over.

        Args:
            agent: who asks.
            wait_s: how long the coordinator may hold one call.
            patience_s: how long an unreachable coordinator is waited for.
            interrupted: called between two tries; raises to give up.

        Raises:
            CoordinatorUnreachableError: it was silent for longer than `patience_s`.
            ResilienceError: it refused.
        """
        request = pb.JoinRequest(run_id=self.run_id, agent=agent, wait_s=wait_s)
        silent_since = self._clock.monotonic()
        num_failures = 0
        while True:
            interrupted()
            try:
                response: pb.JoinResponse = self.stub.Join(request, timeout=wait_s + _CALL_S, metadata=self.metadata)
            except grpc.RpcError as error:
                _raise_unless_transient(error, "Join", self.address)
                if self._clock.monotonic() - silent_since > patience_s:
                    raise CoordinatorUnreachableError(
                        f"coordinator {self.address}: silent for {patience_s:.0f} s; is it running?"
                    ) from None
                threading.Event().wait(_BACKOFF_S[min(num_failures, len(_BACKOFF_S) - 1)])
                num_failures += 1
                continue
            if response.status != pb.JoinResponse.PENDING:
                return response
            silent_since, num_failures = self._clock.monotonic(), 0

    def known_exit_code(self, *, timeout_s: float = 2.0) -> int | None:
        """What the run ends with; None while that is not known, or where nobody answers."""
        try:
            run = self._operator.GetRun(op.GetRunRequest(), timeout=timeout_s, metadata=self.metadata)
        except grpc.RpcError:
            return None
        return run.exit_code if run.HasField("exit_code") else None

    def leave(self, *, generation: int, member: str, exit_code: int, reason: str, timeout_s: float = 2.0) -> bool:
        """Say that a member ends. False when nobody heard it, which changes nothing."""
        request = pb.LeaveRequest(
            run_id=self.run_id, generation=generation, member=member, exit_code=exit_code, reason=reason
        )
        try:
            self.stub.Leave(request, timeout=timeout_s, metadata=self.metadata)
        except grpc.RpcError:
            return False
        return True


def credentials(token_file: Path | None) -> tuple[tuple[str, str], ...]:
    """The metadata that carries the token.

    Raises:
        UsageError: the file cannot be read.
    """
    if token_file is None:
        return ()
    try:
        token = token_file.read_text(encoding="ascii").strip()
    except OSError as error:
        raise UsageError(
            f"{token_file}: token cannot be read ({error.strerror}); it must lie on storage that all nodes share"
        ) from None
    return (("authorization", f"Bearer {token}"),)


def _raise_unless_transient(error: grpc.RpcError, method: str, address: str) -> None:
    code = error.code()
    if code not in _TRY_AGAIN:
        raise ResilienceError(f"coordinator {address} refused {method}: {error.details()} ({code.name})") from None


class ReportStream:
    """An agent's report stream: says that it lives, delivers exits, and keeps the newest orders."""

    def __init__(self, client: CoordinatorClient, *, member: str, interval_s: float) -> None:
        self._client = client
        self._member = member
        self._interval_s = interval_s
        self._generation = 0
        self._sequence = 0
        self._unacknowledged: list[pb.ReportRequest] = []
        self._outbox: queue.SimpleQueue[pb.ReportRequest] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._restart: pb.Restart | None = None
        self._stop: pb.Stop | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="report", daemon=True)

    def begin(self, generation: int) -> None:
        """Report for this generation from now on; orders to end an earlier one are void."""
        with self._lock:
            is_first = self._generation == 0
            self._generation = generation
            self._restart = None
        if is_first:
            self._thread.start()

    def close(self) -> None:
        """End the stream. What was not acknowledged by then is told by Join and Leave as well."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join(timeout=2.0)

    def exits(self, exits: Sequence[RankExit]) -> None:
        """Deliver how ranks ended."""
        with self._lock:
            report = self._next(exits)
            self._unacknowledged.append(report)
        self._outbox.put(report)

    def snapshots(self, facts: Sequence[SnapshotFact]) -> None:
        """Deliver what happened to memory snapshots."""
        with self._lock:
            report = self._next(facts=facts)
            self._unacknowledged.append(report)
        self._outbox.put(report)

    @property
    def restart(self) -> pb.Restart | None:
        """The order to end the current generation, if there is one."""
        with self._lock:
            return self._restart

    @property
    def stop(self) -> pb.Stop | None:
        """The order to end the run, if there is one."""
        with self._lock:
            return self._stop

    def _next(self, exits: Sequence[RankExit] = (), facts: Sequence[SnapshotFact] = ()) -> pb.ReportRequest:
        self._sequence += 1
        return pb.ReportRequest(
            run_id=self._client.run_id,
            generation=self._generation,
            member=self._member,
            sequence=self._sequence,
            exits=[codec.to_proto(exit_) for exit_ in exits],
            snapshots=[codec.to_proto(fact) for fact in facts],
        )

    def _run(self) -> None:
        num_failures = 0
        while not self._closed.is_set():
            try:
                for response in self._client.stub.Report(self._requests(), metadata=self._client.metadata):
                    num_failures = 0
                    self._receive(response)
            except grpc.RpcError:
                pass  # the coordinator is away or restarted; healthy ranks go on meanwhile
            self._closed.wait(_BACKOFF_S[min(num_failures, len(_BACKOFF_S) - 1)])
            num_failures += 1

    def _requests(self) -> Iterator[pb.ReportRequest]:
        """What this connection sends: first what an earlier one could not deliver, then reports as time passes."""
        outbox: queue.SimpleQueue[pb.ReportRequest] = queue.SimpleQueue()
        self._outbox = outbox
        with self._lock:
            resend = list(self._unacknowledged)
        yield from resend
        while not self._closed.is_set():
            try:
                yield outbox.get(timeout=self._interval_s)
            except queue.Empty:
                with self._lock:
                    report = self._next()
                yield report

    def _receive(self, response: pb.ReportResponse) -> None:
        now = SystemClock().wall()
        with self._lock:
            self._unacknowledged = [r for r in self._unacknowledged if r.sequence > response.acknowledged]
            for directive in response.directives:
                if directive.expires_at and directive.expires_at < now:
                    continue
                if directive.HasField("stop"):
                    self._stop = directive.stop
                elif directive.HasField("restart") and directive.restart.ended_generation >= self._generation:
                    self._restart = directive.restart
