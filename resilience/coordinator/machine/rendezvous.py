"""Agents ask for places; when all are there, a generation begins. Ranks follow the order of the hostfile.

agent asks -> known node? --no--> joined
                |yes
running generation has it --> it asks again (answer lost) | its ranks ended (failure) | it is another process (failure)
it has no place in it     --> it waits as a spare one
no generation runs        --> it waits; every place has a node that waits and is in use -> generation begins
"""

from __future__ import annotations

from collections.abc import Iterator

from resilience.coordinator.machine import facts as f
from resilience.coordinator.machine import snapshots
from resilience.coordinator.machine.commands import JoinAgent, JoinRank, Leave
from resilience.coordinator.machine.effects import RefusalKind, Refused
from resilience.coordinator.machine.members import check_generation, check_run, check_running, seat_of
from resilience.coordinator.machine.places import Placing, place
from resilience.coordinator.machine.pulse import Pulse
from resilience.coordinator.machine.reports import flush
from resilience.coordinator.machine.state import Ending, State
from resilience.coordinator.machine.supervision import fail, fail_of_exits, take_order
from resilience.errors import ExitCode
from resilience.policy import FailureKind

__all__ = ["begin", "finish", "join_agent", "join_rank", "leave"]


def join_agent(state: State, pulse: Pulse, command: JoinAgent, now: float) -> Iterator[f.Fact]:
    """An agent asks for a place in the next generation."""
    agent = command.agent
    check_run(state, command.run_id)
    _check_agent(state, command)
    pulse.seen[f"agent:{agent.node}"] = now
    if state.finished is not None:
        return
    known = state.nodes.get(agent.node)
    if known is None or known.agent != agent or not known.is_there:
        yield f.AgentJoined(agent=agent)
    yield from _take_inventory(state, command)
    if not state.generation_ended:
        if agent.node not in state.places:
            yield from _wait(state, command)
            return
        if known is not None and known.agent.pid != agent.pid:
            detail = f"the agent of {agent.node} is another process now (pid {known.agent.pid}, then {agent.pid})"
            yield from fail(state, pulse, FailureKind.AGENT, detail, now)
        elif command.last_generation < state.generation:
            return
        elif _is_done(command):
            yield from _wait_done(state, command)
            return
        elif command.exits:
            yield from fail_of_exits(state, pulse, command.exits, now)
        else:
            detail = f"the agent of {agent.node} asks for a new generation: {command.reason or 'no reason given'}"
            yield from fail(state, pulse, FailureKind.AGENT, detail, now)
    if state.ending is not None or not state.generation_ended:
        return
    yield from _wait(state, command)
    yield from begin(state, pulse, now)


def _wait(state: State, command: JoinAgent) -> Iterator[f.Fact]:
    if not state.nodes[command.agent.node].waiting:
        yield f.AgentWaits(node=command.agent.node, reason=command.reason, master_port=command.master_port)


def _take_inventory(state: State, command: JoinAgent) -> Iterator[f.Fact]:
    node = state.nodes[command.agent.node]
    if (node.guardian_address, node.copies) != (command.guardian_address, command.copies):
        yield f.InventoryTold(node=command.agent.node, guardian_address=command.guardian_address, copies=command.copies)


def _is_done(command: JoinAgent) -> bool:
    return bool(command.exits) and all(e.exit_code == 0 for e in command.exits)


def _wait_done(state: State, command: JoinAgent) -> Iterator[f.Fact]:
    """All ranks of this node ended with 0. It waits, for others may fail; the last one ends the run."""
    name = command.agent.node
    if not state.nodes[name].is_done:
        yield f.AgentWaits(node=name, reason=command.reason, master_port=command.master_port, is_done=True)
    if all(state.nodes[place].is_done for place in state.places) and state.ending is None:
        yield f.RanksDone()


def _check_agent(state: State, command: JoinAgent) -> None:
    agent = command.agent
    if agent.num_nodes < 1 or not agent.devices:
        raise Refused(
            RefusalKind.INVALID,
            f"agent of {agent.node!r} offers {len(agent.devices)} devices on {agent.num_nodes} nodes",
        )
    if state.num_nodes and agent.num_nodes != state.num_nodes:
        raise Refused(
            RefusalKind.INVALID,
            f"agent of {agent.node} was started for {agent.num_nodes} nodes, this run has {state.num_nodes};"
            " start all agents from one launch",
        )
    if state.num_spare_nodes >= agent.num_nodes:
        raise Refused(
            RefusalKind.INVALID,
            f"launch.num_spare_nodes = {state.num_spare_nodes}: the launch has {agent.num_nodes} nodes;"
            " at least one of them must train",
        )
    for other in state.nodes.values():
        if other.agent.node != agent.node and other.agent.node_rank == agent.node_rank and other.left is None:
            raise Refused(
                RefusalKind.INVALID, f"node rank {agent.node_rank} of {agent.node} is taken by {other.agent.node}"
            )
    if command.last_generation > state.generation:
        raise Refused(
            RefusalKind.STALE,
            f"agent of {agent.node} comes from generation {command.last_generation}, this run is in {state.generation};"
            " is it another run's agent?",
        )
    if agent.node not in state.nodes and len(state.nodes) >= agent.num_nodes:
        raise Refused(RefusalKind.UNKNOWN, f"node {agent.node} is not one of this run's: {', '.join(state.nodes)}")


def begin(state: State, pulse: Pulse, now: float) -> Iterator[f.Fact]:
    """Begin the next generation, if all its places can be filled; stop where one of them never will be."""
    if state.generation_ended and state.ending is None and state.finished is None:
        placing = place(state, now)
        yield from placing.decisions
        yield from take_order(state)
        if placing.is_complete and state.ending is None:
            yield from _begin(state, pulse, placing, now)


def _begin(state: State, pulse: Pulse, placing: Placing, now: float) -> Iterator[f.Fact]:
    offered = [(name, device) for name in placing.nodes for device in state.nodes[name].agent.devices]
    seats = tuple(
        f.Seat(rank=rank, node=node, slot=device.slot, device=device.device)
        for rank, (node, device) in enumerate(offered)
    )
    reason = state.generations[-1].ended_by if state.generations else "the run starts"
    yield from flush(state, pulse, now)
    pulse.begin_generation(now)
    yield f.GenerationBegan(
        generation=state.generation + 1,
        seats=seats,
        reason="; ".join((reason, *placing.changes)),
        restore=snapshots.choose(state, seats),
    )


def join_rank(state: State, pulse: Pulse, command: JoinRank, now: float) -> Iterator[f.Fact]:
    """A rank announces itself in the generation that it was started for."""
    check_run(state, command.run_id)
    check_generation(state, command.generation, f"rank {command.rank}")
    check_running(state)
    seat = seat_of(state, command.rank)
    if seat.seat.node != command.node or command.world_size != len(state.seats):
        raise Refused(
            RefusalKind.INVALID,
            f"rank {command.rank} of {command.world_size} on {command.node} does not match its place in generation"
            f" {state.generation}: rank {command.rank} of {len(state.seats)} on {seat.seat.node}",
        )
    member = f"rank:{command.rank}"
    pulse.seen[member] = pulse.moved_at = now
    if not seat.joined or seat.pid != command.pid:
        pulse.sequences.pop(member, None)
        yield f.RankJoined(rank=command.rank, pid=command.pid, versions=command.versions)


def leave(state: State, pulse: Pulse, command: Leave, now: float) -> Iterator[f.Fact]:
    """A member ends and says so."""
    check_run(state, command.run_id)
    if state.finished is not None:
        return
    kind, _, name = command.member.partition(":")
    if kind == "launcher":
        yield from goodbye(state, pulse, command, now)
        return
    if kind == "agent":
        if name not in state.nodes:
            raise Refused(RefusalKind.UNKNOWN, f"{command.member} is not a member of this run")
        if state.nodes[name].left is not None:
            return
    else:
        check_generation(state, command.generation, command.member)
        if seat_of(state, command.member).left is not None:
            return
    yield f.MemberLeft(
        member=command.member, generation=command.generation, exit_code=command.exit_code, reason=command.reason
    )


def goodbye(state: State, pulse: Pulse, command: Leave, now: float) -> Iterator[f.Fact]:
    """The launcher, which outlives the agents, says how the run ended. Its word is final."""
    yield from flush(state, pulse, now)
    yield finish(state, command.exit_code, command.reason)


def finish(state: State, exit_code: int | None = None, reason: str = "") -> f.Finished:
    """The last fact: what the run ends with, by the launcher's word if there is one, and why."""
    ending = state.ending or Ending(0, "all ranks ended with 0")
    code = ending.exit_code if exit_code is None else exit_code
    why = ending.reason if code == ending.exit_code else reason or f"the launcher ended with {code}"
    return f.Finished(exit_code=code, outcome=_OUTCOMES.get(code, "failed"), reason=why)


_OUTCOMES = {
    int(ExitCode.DONE): "finished",
    int(ExitCode.USAGE): "usage",
    int(ExitCode.UNAVAILABLE): "unavailable",
    int(ExitCode.REQUEUE): "requeue",
    int(ExitCode.DO_NOT_REQUEUE): "do_not_requeue",
}
