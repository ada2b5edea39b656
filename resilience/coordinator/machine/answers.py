"""Replies and directives, read off the state. Nothing is queued: what a member is told follows from what is so."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping

from resilience.coordinator.machine.facts import Seat
from resilience.coordinator.machine.state import State
from resilience.policy import Choice

__all__ = [
    "Directive",
    "DirectiveKind",
    "JoinAnswer",
    "JoinStatus",
    "answer_join",
    "directives_for",
    "is_deterministic",
    "skips_in_a_row",
]


class JoinStatus(enum.StrEnum):
    """What an agent that asks for a place should do."""

    READY = "ready"
    PENDING = "pending"
    STOP = "stop"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class JoinAnswer:
    """The answer to an agent."""

    status: JoinStatus
    generation: int = 0
    node_index: int = 0
    num_nodes: int = 0
    world_size: int = 0
    seats: tuple[Seat, ...] = ()
    """Those of the agent's node, in rank order."""
    master_addr: str = ""
    master_port: int = 0
    exit_code: int = 0
    reason: str = ""
    restore: Choice | None = None
    """Where the generation's state comes from."""
    places: tuple[tuple[str, tuple[int, ...]], ...] = ()
    """All nodes of the generation in their order, with their ranks."""
    guardians: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Node of the generation -> address of its guardian."""


class DirectiveKind(enum.StrEnum):
    """Orders that ride on answers to reports."""

    RESTART = "restart"
    STOP = "stop"
    DRAIN = "drain"
    REWIND = "rewind"
    SNAPSHOT = "snapshot"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Directive:
    """An order for one member."""

    directive_id: str
    kind: DirectiveKind
    expires_at: float
    reason: str
    generation: int = 0
    exit_code: int = 0
    step: int | None = None
    """With a rewind: the step of the snapshot."""


_ASKED_FOR_S = 60.0
"""How long rank 0 may take to hear what a person asked for."""


def answer_join(state: State, node: str, last_generation: int) -> JoinAnswer:
    """What to tell the agent of `node`, whose newest generation is `last_generation`."""
    ending = state.finished or state.ending
    if ending is not None:
        return JoinAnswer(status=JoinStatus.STOP, exit_code=ending.exit_code, reason=ending.reason)
    own = tuple(seat.seat for seat in state.seats.values() if seat.seat.node == node)
    if state.generation_ended or last_generation >= state.generation or not own:
        return JoinAnswer(status=JoinStatus.PENDING, reason=_why_pending(state))
    record = state.generations[-1]
    nodes = [name for name, _ in record.places]
    return JoinAnswer(
        status=JoinStatus.READY,
        generation=state.generation,
        node_index=nodes.index(node),
        num_nodes=len(nodes),
        world_size=len(state.seats),
        seats=own,
        master_addr=state.nodes[nodes[0]].agent.address,
        master_port=state.nodes[nodes[0]].master_port,
        reason=record.reason,
        restore=record.restore,
        places=record.places,
        guardians={name: state.nodes[name].guardian_address for name in nodes},
    )


def _why_pending(state: State) -> str:
    if not state.generation_ended:
        return "a spare node: waits until another one is lost or out of use"
    num_places = state.num_nodes - state.num_spare_nodes
    missing = max(0, num_places - sum(1 for name in state.places if state.nodes[name].waiting))
    return f"waiting for the agents of {missing} of {num_places} nodes"


def directives_for(state: State, member: str, generation: int, now: float) -> tuple[Directive, ...]:
    """The orders for `member`, whose newest generation is `generation`.

    Restarts and stops go to agents, which end their ranks; a drain goes to everybody. An order expires with the lease:
    a member that hears it later asks again.
    """
    kind, _, name = member.partition(":")
    expires_at = now + state.lease_s
    orders: list[Directive] = []
    ending = state.finished or state.ending
    if kind == "agent" and ending is not None:
        orders.append(
            Directive(
                directive_id="stop",
                kind=DirectiveKind.STOP,
                expires_at=expires_at,
                reason=ending.reason,
                exit_code=ending.exit_code,
            )
        )
    elif kind == "agent" and generation > 0 and (generation < state.generation or state.generation_ended):
        # One of an older generation was given up, and another node has its place; it may have ranks that still run.
        node = state.nodes.get(name)
        if node is not None and not node.waiting:
            orders.append(
                Directive(
                    directive_id=f"restart-g{generation}",
                    kind=DirectiveKind.RESTART,
                    expires_at=expires_at,
                    reason=state.generations[generation - 1].ended_by,
                    generation=generation,
                )
            )
    if state.drain is not None and ending is None:
        orders.append(
            Directive(directive_id="drain", kind=DirectiveKind.DRAIN, expires_at=expires_at, reason=state.drain)
        )
    if member == "rank:0" and ending is None and generation == state.generation:
        orders += [
            Directive(
                directive_id=f"{wish}-{asked.number}",
                kind=DirectiveKind(wish),
                expires_at=asked.at + _ASKED_FOR_S,
                reason=asked.reason,
                step=asked.step,
            )
            for wish, asked in state.asked.items()
            if asked.generation == state.generation and asked.answer is None and now < asked.at + _ASKED_FOR_S
        ]
    return tuple(orders)


def is_deterministic(state: State) -> bool:
    """Whether an earlier generation on the same nodes measured that replays are bit-equal to each other and to the
    original; a new one need not find out again."""
    is_same_place = len({record.places for record in state.generations}) == 1
    is_off = any(note.kind == "replay_off" for note in state.notes)
    return bool(state.deterministic) and is_same_place and not is_off


def skips_in_a_row(state: State) -> int:
    """Steps in a row, up to the newest one, that were handed to DeepSpeed's skip outside the loss scaler's search."""
    return state.num_skips_in_a_row if state.newest_step <= state.skipped_at_step else 0
