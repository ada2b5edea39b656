"""A rank's line to the coordinator: a background thread with one channel.

The training thread only ever puts things down here; it waits for the network in `decide` (inside a veto) and in `leave`
(at the end), both bounded. The coordinator may be killed and come back at any time: the thread reconnects with backoff,
reads the address again, announces the rank again, and sends again what was not acknowledged.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import random
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import grpc

from resilience.clock import Clock, SystemClock
from resilience.context import RunContext
from resilience.events import Decision, Evidence
from resilience.guard.outbox import MAX_SAMPLES_PER_REPORT, Fact, Outbox
from resilience.rpc.codec import GRPC_OPTIONS, from_proto, to_proto
from resilience.rpc.tls import Tls, open_channel
from resilience.rpc.v1 import coordinator_pb2 as pb
from resilience.rpc.v1 import coordinator_pb2_grpc as pb_grpc

__all__ = ["Client", "RankIdentity"]

MAX_BACKOFF_S = 2.0
FENCED = (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED)
"""Answers that no retry will change: the generation has ended, or the token is not this run's."""

UNDELIVERED = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED)
"""Ends of a call after which the coordinator may not have what was sent."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RankIdentity:
    """Who this process is."""

    generation: int
    rank: int
    local_rank: int
    world_size: int
    node: str
    device: str
    device_name: str
    pid: int
    versions: Mapping[str, str]

    def to_proto(self) -> pb.RankInfo:
        return pb.RankInfo(
            generation=self.generation,
            rank=self.rank,
            local_rank=self.local_rank,
            world_size=self.world_size,
            node=self.node,
            device=pb.Device(slot=self.local_rank, device=self.device, name=self.device_name),
            pid=self.pid,
            versions=self.versions,
        )


class Client:
    """See the module's head. `start` before use, `leave` at the end."""

    def __init__(self, context: RunContext, identity: RankIdentity, *, clock: Clock | None = None) -> None:
        self._context = context
        self._identity = identity
        self._clock = clock or SystemClock()
        self._member = f"rank:{identity.rank}"
        self._lock = threading.Condition()
        self._outbox = Outbox(run_id=context.run_id, generation=identity.generation, member=self._member)
        self._heartbeat = pb.Heartbeat(state="starting")
        self._unconcluded: dict[str, Decision] = {}
        self._concluding: set[str] = set()
        self._channel: grpc.Channel | None = None
        self._stream: Any = None
        self._num_sessions = 0
        self._closed = False
        self._obeyed: set[str] = set()
        self._thread = threading.Thread(target=self._run, name="resilience-client", daemon=True)

        self.fenced_reason: str | None = None
        """Why this process must not step any more, once a newer generation has begun."""
        self.stop: pb.Stop | None = None
        """The coordinator's order to end, if there is one."""
        self.restart: pb.Restart | None = None
        """The coordinator's order to leave for a new generation, if there is one."""
        self.drain: pb.Drain | None = None
        """The coordinator's order to leave after the next checkpoint, if there is one."""
        self.rewind: pb.Rewind | None = None
        """An operator's order to go back to a memory snapshot, until it was carried out or cannot be."""
        self.take_snapshot: pb.Directive | None = None
        """An operator's order to take a memory snapshot, until it was carried out or cannot be."""
        self.joined = threading.Event()
        """Set once the coordinator has accepted this rank; its answer is in `join_response`."""
        self.join_response: pb.JoinResponse | None = None

    # ------ what the training thread calls

    def start(self) -> None:
        """Begin to announce, report and listen, in the background."""
        self._thread.start()

    def report(self, fact: Fact) -> None:
        """Put a fact down. Never blocks; delivered as long as a coordinator comes back before the run ends."""
        with self._lock:
            self._outbox.put(fact)
            self._lock.notify_all()

    def note(self, kind: str, message: str, *, step: int = 0) -> None:
        """Report something that a person should read."""
        self.report(pb.Note(kind=kind, message=message, step=step, at=self._clock.wall()))

    def heartbeat(self, *, step_seconds: float | None = None, **fields: Any) -> None:
        """Update what the next heartbeat says; fields as in `Heartbeat`. A finished step adds its duration."""
        with self._lock:
            for name, value in fields.items():
                if name == "checks":
                    del self._heartbeat.checks[:]
                    self._heartbeat.checks.extend(pb.CheckCount(site=site, count=n) for site, n in value.items())
                elif name in ("residual_ratios", "snapshot_seconds_since"):
                    samples = getattr(self._heartbeat, name)
                    samples.extend(list(value)[: max(MAX_SAMPLES_PER_REPORT - len(samples), 0)])
                else:
                    setattr(self._heartbeat, name, value)
            if step_seconds is not None:
                self._heartbeat.step_seconds = step_seconds
                self._heartbeat.step_seconds_since.append(step_seconds)

    def add_badput(self, cause: str, seconds: float) -> None:
        """Account for seconds that were not spent on steps."""
        with self._lock:
            self._outbox.add_badput({cause: seconds})

    def add_skipped_step(self) -> None:
        """Count an optimizer step that DeepSpeed skipped."""
        with self._lock:
            self._outbox.add_skipped_step()

    def set_deterministic(self, deterministic: bool) -> None:
        """Report whether this generation was measured to be bit-reproducible."""
        with self._lock:
            self._outbox.set_deterministic(deterministic)

    def decide(self, evidence: Evidence, deadline_s: float) -> Decision | None:
        """Ask what to do. Blocks up to `deadline_s` seconds; None when the coordinator did not answer in time."""
        channel = self._channel
        if channel is None:
            return None
        request = pb.DecideRequest(evidence=to_proto(evidence))
        try:
            answer = pb_grpc.CoordinatorStub(channel).Decide(
                request, timeout=deadline_s, metadata=self._metadata(), wait_for_ready=True
            )
        except (grpc.RpcError, ValueError) as error:
            # ValueError: the background thread closed this channel meanwhile, to open another.
            if isinstance(error, grpc.RpcError) and error.code() is grpc.StatusCode.FAILED_PRECONDITION:
                self.fenced_reason = error.details()
            return None
        decision: Decision = from_proto(answer.decision)
        return decision

    def conclude(self, decision: Decision) -> None:
        """Say what was executed and how it ended. Never blocks; delivered like a fact."""
        with self._lock:
            self._unconcluded[decision.decision_id] = decision
            self._lock.notify_all()

    def leave(self, exit_code: int, reason: str, *, timeout_s: float = 5.0) -> None:
        """Deliver what is left, say goodbye, end the thread; within `timeout_s` seconds in all."""
        deadline = self._clock.monotonic() + timeout_s
        with self._lock:
            self._heartbeat.state = "done"
            # The last step's heartbeat is the only one whose loss would stay.
            self._outbox.demand_acknowledgement()
            self._lock.notify_all()
            self._lock.wait_for(self._is_delivered, timeout=max(0.0, timeout_s / 2))
            channel = self._channel
        if channel is not None and self.fenced_reason is None:
            with contextlib.suppress(grpc.RpcError, ValueError):
                pb_grpc.CoordinatorStub(channel).Leave(
                    pb.LeaveRequest(
                        run_id=self._context.run_id,
                        generation=self._identity.generation,
                        member=self._member,
                        exit_code=exit_code,
                        reason=reason,
                    ),
                    timeout=max(0.1, deadline - self._clock.monotonic()),
                    metadata=self._metadata(),
                )
        with self._lock:
            self._closed = True
            self._lock.notify_all()
            stream = self._stream
        if stream is not None:
            stream.cancel()
        self._thread.join(max(0.1, deadline - self._clock.monotonic()))

    # ------ the background thread

    def _run(self) -> None:
        backoff_s = 0.05
        while not self._closed and self.fenced_reason is None:
            try:
                self._session()
                backoff_s = 0.05
            except grpc.RpcError as error:
                if self._closed:
                    return
                if error.code() in FENCED:
                    self.fenced_reason = error.details() or error.code().name
                    return
            if self.joined.is_set():
                backoff_s = min(backoff_s, 0.5)
            with self._lock:
                # Jitter keeps a thousand ranks from knocking in step when their coordinator comes back.
                self._lock.wait_for(lambda: self._closed, timeout=backoff_s * random.uniform(0.5, 1.0))
            backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)

    def _session(self) -> None:
        tls = Tls.of(self._context.config.coordinator)
        with open_channel(self._address(), tls, GRPC_OPTIONS) as channel:
            stub = pb_grpc.CoordinatorStub(channel)
            request = pb.JoinRequest(run_id=self._context.run_id, rank=self._identity.to_proto())
            self.join_response = stub.Join(request, timeout=10.0, metadata=self._metadata(), wait_for_ready=True)
            with self._lock:
                self._channel = channel
                self._num_sessions += 1
                self._concluding.clear()
            self.joined.set()
            self._stream = stub.Report(self._reports(stub, self._num_sessions), metadata=self._metadata())
            try:
                for response in self._stream:
                    self._receive(response)
            finally:
                with self._lock:
                    self._channel = None

    def _reports(self, stub: Any, session: int) -> Iterator[pb.ReportRequest]:
        """What goes up the stream of one session; runs on gRPC's own thread until the session ends."""
        yield from self._outbox.unacknowledged()
        while True:
            with self._lock:
                # A thread of an earlier session may wake up late; what it took would wait for the next reconnection.
                if self._closed or session != self._num_sessions:
                    return
                heartbeat, self._heartbeat = self._heartbeat, _without_samples(self._heartbeat)
                report = self._outbox.next_report(heartbeat)
                unconcluded = [d for name, d in self._unconcluded.items() if name not in self._concluding]
            yield report
            for decision in unconcluded:
                self._send_conclusion(stub, decision)
            with self._lock:
                self._lock.wait_for(
                    lambda: self._closed or session != self._num_sessions or self._has_news(),
                    timeout=self._context.config.coordinator.heartbeat_interval_s,
                )

    def _send_conclusion(self, stub: Any, decision: Decision) -> None:
        request = pb.ConcludeRequest(run_id=self._context.run_id, rank=self._identity.rank, decision=to_proto(decision))
        self._concluding.add(decision.decision_id)
        call = stub.Conclude.future(request, timeout=10.0, metadata=self._metadata())

        def done(finished: Any) -> None:
            with self._lock:
                self._concluding.discard(decision.decision_id)
                # Whatever was answered stands; only what may not have arrived is sent again.
                if not finished.cancelled() and finished.code() not in UNDELIVERED:
                    self._unconcluded.pop(decision.decision_id, None)
                self._lock.notify_all()

        call.add_done_callback(done)

    def _receive(self, response: pb.ReportResponse) -> None:
        with self._lock:
            self._outbox.acknowledge(response.acknowledged)
            for directive in response.directives:
                self._obey(directive)
            self._lock.notify_all()

    def _obey(self, directive: pb.Directive) -> None:
        if directive.directive_id in self._obeyed or directive.expires_at < self._clock.wall():
            return
        self._obeyed.add(directive.directive_id)
        order = directive.WhichOneof("order")
        if order == "stop":
            self.stop = directive.stop
        elif order == "restart" and directive.restart.ended_generation >= self._identity.generation:
            self.restart = directive.restart
        elif order == "drain":
            self.drain = directive.drain
        elif order == "rewind":
            self.rewind = directive.rewind
        elif order == "take_snapshot":
            self.take_snapshot = directive

    def _has_news(self) -> bool:
        return self._outbox.has_news or any(name not in self._concluding for name in self._unconcluded)

    def _is_delivered(self) -> bool:
        return self._outbox.is_empty and not self._unconcluded

    def _address(self) -> str:
        """The coordinator's address: from the run directory, where a restarted one leaves it, else the context's."""
        with contextlib.suppress(OSError, ValueError, KeyError):
            return str(json.loads((self._context.run_dir / "coordinator.json").read_text())["address"])
        return self._context.coordinator_address

    def _metadata(self) -> tuple[tuple[str, str], ...]:
        token_file = self._context.token_file
        if token_file is None:
            return ()
        return (("authorization", f"Bearer {token_file.read_text(encoding='utf-8').strip()}"),)


def _without_samples(heartbeat: pb.Heartbeat) -> pb.Heartbeat:
    fresh = pb.Heartbeat()
    fresh.CopyFrom(heartbeat)
    del fresh.step_seconds_since[:]
    del fresh.residual_ratios[:]
    del fresh.snapshot_seconds_since[:]
    return fresh
