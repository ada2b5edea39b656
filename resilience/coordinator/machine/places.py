"""Who takes part in the next generation: the nodes of the last one, a spare in the place of each that is gone. Pure.

A place is kept from generation to generation, and so are its ranks: the files of a memory snapshot lie on the nodes
whose ranks wrote them.

node waits, in use      --> keeps its place
node on its way         --> is waited for
node lost | cordoned    --> the first spare that waits, with as many devices, takes its place;
                            no spare --> lost: waited for, `launch.node_wait_s` long --> stop, 75
                                         cordoned: a spare that is on its way is waited for --> stop, 75
"""

from __future__ import annotations

import dataclasses

from resilience.coordinator.machine import facts as f
from resilience.coordinator.machine.state import State
from resilience.events import Action, Outcome
from resilience.policy import Failure, FailureKind, decide_exit

__all__ = ["Placing", "place"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Placing:
    """An attempt to fill all places."""

    nodes: tuple[str, ...]
    """In the order of the places, as far as they are filled."""
    is_complete: bool
    changes: tuple[str, ...]
    """In words."""
    decisions: tuple[f.DecisionMade, ...]
    """About places that another node takes; or one that stops the run, where none can."""


def place(state: State, now: float) -> Placing:
    """Fill the places of the next generation with nodes that wait."""
    taken: list[str] = []
    changes: list[str] = []
    decisions: list[f.DecisionMade] = []
    for name in state.places:
        kind, detail = _why_not(state, name)
        if kind is None:
            taken += [name] if state.nodes[name].waiting else []
            continue
        spare = next((s for s in state.spares_for(name) if s not in taken), None)
        if spare is None and _may_come(state, name, kind, now):
            continue
        made = _decide(state, kind, detail, spare, now)
        if spare is None or made.decision.action is not Action.RESTART:
            return Placing(nodes=(), is_complete=False, changes=(), decisions=(made,))
        taken.append(spare)
        changes.append(f"{spare} takes the place of {name}")
        decisions.append(made)
    num_places = len(state.places) if state.generations else state.num_nodes - state.num_spare_nodes
    # Before the first agent comes there are no places, and nothing to begin with.
    is_complete = 0 < num_places == len(taken)
    return Placing(
        nodes=tuple(taken),
        is_complete=is_complete,
        changes=tuple(changes),
        decisions=tuple(decisions) if is_complete else (),
    )


def _why_not(state: State, name: str) -> tuple[FailureKind | None, str]:
    """Why a node cannot keep its place; None and nothing where it can."""
    node = state.nodes[name]
    if not node.is_there:
        waited = f" and did not come back within {state.node_wait_s:g} s" if state.node_wait_s else ""
        return FailureKind.NODE_LOST, f"node {name} is lost{waited}"
    device = state.cordoned_device(name)
    if device is None:
        return None, ""
    detail = (
        f"device {device} is cordoned: {state.cordons[device].reason or 'no reason given'};"
        f" launch without it, or `resilience uncordon {device}` once it is mended"
    )
    return FailureKind.CORDONED, detail


def _may_come(state: State, name: str, kind: FailureKind, now: float) -> bool:
    """Whether the place may still be filled without a spare that waits already."""
    if kind is FailureKind.NODE_LOST:
        lost_at = state.nodes[name].lost_at
        return lost_at is not None and now - lost_at < state.node_wait_s
    if state.num_spare_nodes == 0:
        return False
    others = [node for other, node in state.nodes.items() if other not in state.places]
    on_their_way = [node for node in others if node.is_there and not node.waiting]
    return bool(on_their_way) or len(state.nodes) < state.num_nodes


def _decide(state: State, kind: FailureKind, detail: str, spare: str | None, now: float) -> f.DecisionMade:
    failure = Failure(
        generation=state.generation + 1, kind=kind, at=now, detail=detail, spares=() if spare is None else (spare,)
    )
    decision = decide_exit([failure], state.limits, state.mode, now=now)
    decision = dataclasses.replace(
        decision, decision_id=f"g{failure.generation}-place" + (f"-{spare}" if spare else "")
    )
    if decision.action is Action.RESTART:
        # The generation that begins now carries it out.
        decision = dataclasses.replace(decision, outcome=Outcome.SUCCEEDED)
    return f.DecisionMade(decision=decision)
