"""gRPC in front of the machine: read a message, submit a command, answer from the state. No rules of its own."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

import grpc

from resilience.coordinator import queries, translate
from resilience.coordinator.devices import DevicesError
from resilience.coordinator.host import Host
from resilience.coordinator.journal import JournalError
from resilience.coordinator.machine import RefusalKind, Refused
from resilience.coordinator.machine import commands as c
from resilience.coordinator.machine.answers import (
    JoinStatus,
    answer_join,
    directives_for,
    is_deterministic,
    skips_in_a_row,
)
from resilience.coordinator.machine.facts import Wish
from resilience.coordinator.machine.operations import devices_of
from resilience.coordinator.machine.vetoes import decision_id
from resilience.rpc.codec import BoundsError, check_bounds, to_proto
from resilience.rpc.v1 import coordinator_pb2 as pb
from resilience.rpc.v1 import coordinator_pb2_grpc, operator_pb2_grpc
from resilience.rpc.v1 import operator_pb2 as op

__all__ = ["CoordinatorService", "OperatorService"]

MAX_JOIN_WAIT_S = 30.0
"""How long a Join may be held, whatever it asks for."""

MAX_ANSWER_WAIT_S = 60.0
"""How long a call may be held for the ranks' answer: as long as an order is told to them."""

_POLL_S = 1.0
"""How often a held call looks again although nothing woke it."""

_CODES = {
    RefusalKind.STALE: grpc.StatusCode.FAILED_PRECONDITION,
    RefusalKind.UNKNOWN: grpc.StatusCode.NOT_FOUND,
    RefusalKind.INVALID: grpc.StatusCode.INVALID_ARGUMENT,
}

T = TypeVar("T")
Handler = Callable[[Any, Any, Any], Awaitable[T]]


def _answers(handler: Handler[T]) -> Handler[T]:
    """Bounds before, refusals as statuses after, and the time between as a metric (without what was held)."""

    @functools.wraps(handler)
    async def answer(self: Any, request: Any, context: Any) -> T:
        started = self.host.monotonic()
        try:
            check_bounds(request)
            return await handler(self, request, context)
        except BoundsError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except Refused as error:
            await context.abort(_CODES[error.kind], str(error))
        except (JournalError, DevicesError) as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))
        finally:
            _observe(self.host, handler.__name__, self.host.monotonic() - started)
        raise AssertionError("abort raises")

    return answer


def _observe(host: Host, method: str, seconds: float) -> None:
    with contextlib.suppress(JournalError):
        host.submit(c.ObserveRpc(method=method, seconds=seconds))


class CoordinatorService(coordinator_pb2_grpc.CoordinatorServicer):
    """What agents and ranks call."""

    def __init__(self, host: Host) -> None:
        self.host = host

    @_answers
    async def Join(self, request: pb.JoinRequest, context: Any) -> pb.JoinResponse:
        if request.WhichOneof("member") == "rank":
            self.host.submit(translate.join_rank_command(request))
            response = pb.JoinResponse(status=pb.JoinResponse.READY)
        elif request.WhichOneof("member") == "agent":
            response = await self._join_agent(request)
        else:
            raise BoundsError("JoinRequest.member is not set; it must be an agent or a rank")
        response.last_verified_step = self.host.machine.state.last_verified_step
        response.consecutive_skips = skips_in_a_row(self.host.machine.state)
        response.deterministic = is_deterministic(self.host.machine.state)
        return response

    async def _join_agent(self, request: pb.JoinRequest) -> pb.JoinResponse:
        command = translate.join_agent_command(request)
        self.host.submit(command)
        until = self.host.monotonic() + min(max(request.wait_s, 0.0), MAX_JOIN_WAIT_S)
        while True:
            answer = answer_join(self.host.machine.state, command.agent.node, command.last_generation)
            left_s = until - self.host.monotonic()
            if answer.status is not JoinStatus.PENDING or left_s <= 0:
                return translate.join_response(answer)
            await self.host.changed(min(left_s, _POLL_S))

    async def Report(self, request_iterator: Any, context: Any) -> None:
        """Answers each report, and speaks up by itself when there is a new order for the member."""
        told: frozenset[str] = frozenset()
        newest: pb.ReportRequest | None = None
        read = asyncio.ensure_future(context.read())
        try:
            while True:
                change = asyncio.ensure_future(self.host.changed(MAX_JOIN_WAIT_S))
                await asyncio.wait({read, change}, return_when=asyncio.FIRST_COMPLETED)
                change.cancel()
                if read.done():
                    newest = read.result()
                    if newest is grpc.aio.EOF:  # type: ignore[attr-defined]  # grpc-stubs lacks it
                        return
                    response = await self._take_report(newest, context)
                    read = asyncio.ensure_future(context.read())
                elif newest is None or self._orders(newest) <= told:
                    continue
                else:
                    response = self._response(newest)
                told = frozenset(directive.directive_id for directive in response.directives)
                await context.write(response)
        finally:
            read.cancel()

    @_answers
    async def _take_report(self, request: pb.ReportRequest, context: Any) -> pb.ReportResponse:
        self.host.submit(translate.report_command(request))
        return self._response(request)

    def _response(self, request: pb.ReportRequest) -> pb.ReportResponse:
        state = self.host.machine.state
        directives = directives_for(state, request.member, request.generation, self.host.now())
        return pb.ReportResponse(
            acknowledged=request.sequence, directives=[translate.directive_message(d) for d in directives]
        )

    def _orders(self, request: pb.ReportRequest) -> frozenset[str]:
        state = self.host.machine.state
        found = directives_for(state, request.member, request.generation, self.host.now())
        return frozenset(directive.directive_id for directive in found)

    @_answers
    async def Decide(self, request: pb.DecideRequest, context: Any) -> pb.DecideResponse:
        command = translate.decide_command(request)
        self.host.submit(command)
        return pb.DecideResponse(decision=to_proto(self.host.machine.state.decisions[decision_id(command)]))

    @_answers
    async def Conclude(self, request: pb.ConcludeRequest, context: Any) -> pb.ConcludeResponse:
        command = translate.conclude_command(request)
        self.host.submit(command)
        late = f"{command.decision.decision_id}-superseded"
        return pb.ConcludeResponse(superseded=late in self.host.machine.state.decisions)

    @_answers
    async def Leave(self, request: pb.LeaveRequest, context: Any) -> pb.LeaveResponse:
        self.host.submit(translate.leave_command(request))
        return pb.LeaveResponse()


class OperatorService(operator_pb2_grpc.OperatorServicer):
    """What people call."""

    def __init__(self, host: Host, *, pid: int) -> None:
        self.host = host
        self._pid = pid

    @_answers
    async def GetRun(self, request: op.GetRunRequest, context: Any) -> op.Run:
        return queries.get_run(self.host.machine, now=self.host.now(), pid=self._pid)

    @_answers
    async def ListRanks(self, request: op.ListRanksRequest, context: Any) -> op.ListRanksResponse:
        return queries.list_ranks(self.host.machine, now=self.host.now())

    @_answers
    async def ListDetections(self, request: op.ListDetectionsRequest, context: Any) -> op.ListDetectionsResponse:
        return queries.list_detections(
            self.host.machine.state, include_propagated=request.include_propagated, limit=request.limit
        )

    @_answers
    async def ListDecisions(self, request: op.ListDecisionsRequest, context: Any) -> op.ListDecisionsResponse:
        return queries.list_decisions(self.host.machine.state, limit=request.limit)

    @_answers
    async def ExplainDecision(self, request: op.ExplainDecisionRequest, context: Any) -> op.Explanation:
        explanation = queries.explain_decision(self.host.machine.state, request.decision_id)
        if explanation is None:
            raise Refused(
                RefusalKind.UNKNOWN, f"no decision {request.decision_id!r} in this run; see `resilience decisions`"
            )
        return explanation

    @_answers
    async def ListCheckpoints(self, request: op.ListCheckpointsRequest, context: Any) -> op.ListCheckpointsResponse:
        return queries.list_checkpoints(self.host.machine.state)

    async def StreamEvents(self, request: op.StreamEventsRequest, context: Any) -> AsyncIterator[op.Event]:
        sequence = request.after_sequence
        while True:
            for event in queries.events_after(self.host.machine.state, sequence):
                yield event
                sequence = event.sequence
            if not request.follow or self.host.machine.state.finished is not None:
                return
            await self.host.changed(_POLL_S)

    @_answers
    async def ListDevices(self, request: op.ListDevicesRequest, context: Any) -> op.ListDevicesResponse:
        return queries.list_devices(self.host.machine.state, self.host.history.records())

    @_answers
    async def SetCordon(self, request: op.SetCordonRequest, context: Any) -> op.SetCordonResponse:
        before = set(self.host.machine.state.cordons)
        known = tuple((r.device, r.node) for r in self.host.history.records() if request.target in (r.device, r.node))
        devices = devices_of(self.host.machine.state, request.target) or known
        self.host.submit(
            c.SetCordon(target=request.target, cordoned=request.cordoned, reason=request.reason, devices=known)
        )
        changed = before ^ set(self.host.machine.state.cordons)
        return op.SetCordonResponse(devices=[device for device, _ in devices if device in changed])

    @_answers
    async def ListSnapshots(self, request: op.ListSnapshotsRequest, context: Any) -> op.ListSnapshotsResponse:
        return queries.list_snapshots(self.host.machine)

    @_answers
    async def TakeSnapshotNow(self, request: op.TakeSnapshotNowRequest, context: Any) -> op.TakeSnapshotNowResponse:
        self.host.submit(c.AskRanks(wish=Wish.SNAPSHOT, reason=request.reason))
        state = self.host.machine.state
        generation, until = state.generation, self.host.monotonic() + min(max(request.wait_s, 0.0), MAX_ANSWER_WAIT_S)
        while True:
            answer = queries.snapshot_answer(state, generation)
            left_s = until - self.host.monotonic()
            if answer is not None:
                return answer
            if left_s <= 0:
                return op.TakeSnapshotNowResponse(
                    generation=generation, reason="the ranks are within a step; the order stands until its end"
                )
            await self.host.changed(min(left_s, _POLL_S))

    @_answers
    async def RewindRun(self, request: op.RewindRunRequest, context: Any) -> op.RewindRunResponse:
        step = request.step if request.HasField("step") else None
        self.host.submit(c.AskRanks(wish=Wish.REWIND, reason=request.reason, step=step))
        return op.RewindRunResponse()

    @_answers
    async def DrainRun(self, request: op.DrainRunRequest, context: Any) -> op.DrainRunResponse:
        self.host.submit(c.Drain(reason=request.reason))
        return op.DrainRunResponse()
