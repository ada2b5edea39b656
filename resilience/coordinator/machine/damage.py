"""Which snapshots of a generation that ends in the middle of mending its state may hold damage. Pure.

Ranks give up newer snapshots before they load an older one, but they are not at one in the same moment: where some are
killed on the way, what they had not given up yet can be whole again by way of parity. So the coordinator holds it
against them too, from its journal.
"""

from __future__ import annotations

from collections.abc import Iterator

from resilience.coordinator.machine.state import State
from resilience.events import Action, Decision, Detection, Outcome, Verdict
from resilience.policy import is_damage

__all__ = ["is_unsettled", "rewinding_to"]


def rewinding_to(state: State) -> int | None:
    """The step that the newest generation was going back to, where nobody has said yet that it arrived."""
    steps = [state.evidence[each.decision_id].rewind_step for each in _rewinds(state)]
    return min((step for step in steps if step is not None), default=None)


def is_unsettled(state: State) -> bool:
    """Whether damage to the state was seen in the newest generation that neither a decision nor a rewind settles.

    What a rewind under way was decided upon is settled by its target; what shows up on the way is not.
    """
    covered = {(each.step, each.attempt) for each in _rewinds(state)}
    return any(
        (found.step, found.attempt) not in covered for found in state.detections.values() if _is_open(state, found)
    )


def _rewinds(state: State) -> Iterator[Decision]:
    for decision in state.decisions.values():
        is_open = decision.action is Action.REWIND and decision.outcome is Outcome.PENDING
        if is_open and decision.generation == state.generation and decision.decision_id in state.evidence:
            yield decision


def _is_open(state: State, found: Detection) -> bool:
    is_pending = found.verdict is Verdict.PENDING and not found.mended
    return is_pending and found.generation == state.generation and is_damage(found)
