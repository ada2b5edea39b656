"""From the messages of the Coordinator service to commands, and from answers to messages. No rules of its own."""

from __future__ import annotations

from resilience.coordinator.machine import commands as c
from resilience.coordinator.machine.answers import Directive, DirectiveKind, JoinAnswer, JoinStatus
from resilience.coordinator.machine.facts import Agent, Device, Note
from resilience.policy import Copy
from resilience.rpc.codec import BoundsError, clip, from_proto
from resilience.rpc.v1 import coordinator_pb2 as pb

__all__ = [
    "conclude_command",
    "decide_command",
    "directive_message",
    "join_agent_command",
    "join_rank_command",
    "join_response",
    "leave_command",
    "report_command",
]


def join_agent_command(request: pb.JoinRequest) -> c.JoinAgent:
    """An agent's request for a place."""
    info = request.agent
    _require(info.node, "JoinRequest.agent.node")
    return c.JoinAgent(
        run_id=request.run_id,
        agent=Agent(
            node=info.node,
            node_rank=info.node_rank,
            num_nodes=info.num_nodes,
            address=info.address,
            devices=tuple(Device(slot=d.slot, device=d.device, name=d.name) for d in info.devices),
            pid=info.pid,
        ),
        last_generation=info.last_generation,
        exits=tuple(from_proto(e) for e in info.exits),
        reason=info.reason,
        master_port=info.master_port,
        copies=tuple(_copy(copy) for copy in info.snapshots),
        guardian_address=info.guardian_address,
    )


def _copy(copy: pb.SnapshotCopy) -> Copy:
    return Copy(
        step=copy.step,
        generation=copy.generation,
        world_size=copy.world_size,
        ranks=tuple(sorted(copy.ranks)),
        clean_through=copy.clean_through,
        parity_nodes=tuple(copy.parity_nodes),
        parity_losses=copy.parity_losses,
        num_bytes=copy.num_bytes,
        at=copy.at,
    )


def join_rank_command(request: pb.JoinRequest) -> c.JoinRank:
    """A rank's announcement."""
    info = request.rank
    return c.JoinRank(
        run_id=request.run_id,
        generation=info.generation,
        rank=info.rank,
        world_size=info.world_size,
        node=info.node,
        pid=info.pid,
        versions=tuple(sorted(info.versions.items())),
    )


def report_command(request: pb.ReportRequest) -> c.Report:
    """One report of a member."""
    _require(request.member, "ReportRequest.member")
    return c.Report(
        run_id=request.run_id,
        generation=request.generation,
        member=request.member,
        sequence=request.sequence,
        heartbeat=_heartbeat(request.heartbeat) if request.HasField("heartbeat") else None,
        detections=tuple(from_proto(d) for d in request.detections),
        decisions=tuple(from_proto(d) for d in request.decisions),
        strikes=tuple(from_proto(s) for s in request.strikes),
        exits=tuple(from_proto(e) for e in request.exits),
        checkpoints=tuple(from_proto(fact) for fact in request.checkpoints),
        snapshots=tuple(from_proto(fact) for fact in request.snapshots),
        answers=tuple(from_proto(answer) for answer in request.answers),
        notes=tuple(Note(kind=n.kind, message=n.message, step=n.step, at=n.at) for n in request.notes),
        deterministic=request.deterministic if request.HasField("deterministic") else None,
        badput_seconds=tuple(sorted(request.badput_seconds.items())),
        num_skipped_steps=request.num_skipped_steps,
    )


def _heartbeat(beat: pb.Heartbeat) -> c.Heartbeat:
    return c.Heartbeat(
        step=beat.step,
        micro_step=beat.micro_step,
        state=beat.state or "training",
        loss=beat.loss if beat.HasField("loss") else None,
        tokens_per_s=beat.tokens_per_s if beat.HasField("tokens_per_s") else None,
        step_seconds=beat.step_seconds if beat.HasField("step_seconds") else None,
        last_verified_step=beat.last_verified_step,
        checks=tuple((check.site, check.count) for check in beat.checks),
        abft_overhead_ratio=beat.abft_overhead_ratio if beat.HasField("abft_overhead_ratio") else None,
        step_seconds_since=tuple(beat.step_seconds_since),
        residual_ratios=tuple(beat.residual_ratios),
        snapshot_seconds_since=tuple(beat.snapshot_seconds_since),
        snapshot_interval_steps=beat.snapshot_interval_steps if beat.HasField("snapshot_interval_steps") else None,
    )


def decide_command(request: pb.DecideRequest) -> c.Decide:
    """Rank 0's question."""
    return c.Decide(evidence=from_proto(request.evidence))


def conclude_command(request: pb.ConcludeRequest) -> c.Conclude:
    """What rank 0 executed."""
    decision = from_proto(request.decision)
    _require(decision.decision_id, "ConcludeRequest.decision.decision_id")
    return c.Conclude(run_id=request.run_id, rank=request.rank, decision=decision)


def leave_command(request: pb.LeaveRequest) -> c.Leave:
    """A member's goodbye."""
    return c.Leave(
        run_id=request.run_id,
        generation=request.generation,
        member=request.member,
        exit_code=request.exit_code,
        reason=request.reason,
    )


def join_response(answer: JoinAnswer) -> pb.JoinResponse:
    """The answer to an agent."""
    if answer.status is JoinStatus.READY:
        return pb.JoinResponse(
            status=pb.JoinResponse.READY,
            assignment=pb.Assignment(
                generation=answer.generation,
                node_index=answer.node_index,
                num_nodes=answer.num_nodes,
                world_size=answer.world_size,
                first_rank=answer.seats[0].rank,
                slots=[seat.slot for seat in answer.seats],
                master_addr=answer.master_addr,
                master_port=answer.master_port,
                reason=clip(answer.reason),
                restore=_restore(answer),
                peers=[
                    pb.Peer(node=node, guardian_address=answer.guardians.get(node, ""), ranks=ranks)
                    for node, ranks in answer.places
                ],
            ),
        )
    status = pb.JoinResponse.STOP if answer.status is JoinStatus.STOP else pb.JoinResponse.PENDING
    return pb.JoinResponse(status=status, exit_code=answer.exit_code, reason=clip(answer.reason))


def _restore(answer: JoinAnswer) -> pb.Restore | None:
    """None leaves the state to the script."""
    choice = answer.restore
    if choice is None or not choice.is_snapshot:
        return None
    peers = [
        pb.Peer(node=holder.node, guardian_address=answer.guardians.get(holder.node, ""), ranks=holder.ranks)
        for holder in choice.holders
    ]
    return pb.Restore(step=choice.step, generation=choice.generation, peers=peers)


def directive_message(directive: Directive) -> pb.Directive:
    """An order as a message."""
    message = pb.Directive(directive_id=directive.directive_id, expires_at=directive.expires_at)
    reason = clip(directive.reason)
    if directive.kind is DirectiveKind.RESTART:
        message.restart.CopyFrom(pb.Restart(ended_generation=directive.generation, reason=reason))
    elif directive.kind is DirectiveKind.STOP:
        message.stop.CopyFrom(pb.Stop(exit_code=directive.exit_code, reason=reason))
    elif directive.kind is DirectiveKind.DRAIN:
        message.drain.CopyFrom(pb.Drain(reason=reason))
    elif directive.kind is DirectiveKind.REWIND:
        message.rewind.CopyFrom(pb.Rewind(reason=reason, step=directive.step))
    else:
        message.take_snapshot.CopyFrom(pb.TakeSnapshot(reason=reason))
    return message


def _require(text: str, name: str) -> None:
    if not text:
        raise BoundsError(f"{name} is empty; it must be set")
