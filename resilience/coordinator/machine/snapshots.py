"""Memory snapshots as the coordinator knows them: what nodes told of them, and which one a generation begins from."""

from __future__ import annotations

from collections.abc import Sequence

from resilience.coordinator.machine.facts import Reported, Seat
from resilience.coordinator.machine.state import State, places_of
from resilience.events import Mode, SnapshotFact, SnapshotKind
from resilience.policy import Choice, Tier, choose_restore

__all__ = ["choose", "is_news", "note"]


def is_news(state: State, generation: int, fact: SnapshotFact) -> bool:
    """Whether `fact`, told by a member of `generation`, is not known yet."""
    if fact.kind is SnapshotKind.LOADED:
        return fact not in state.loaded_snapshots
    if fact.kind is SnapshotKind.REFUSED:
        return fact.tier != Tier.DISK and _refusal(generation, fact) not in state.refusals
    return False


def note(state: State, fact: Reported) -> None:
    """What members told of memory snapshots."""
    state.loaded_snapshots += [each for each in fact.snapshots if each.kind is SnapshotKind.LOADED]
    for each in fact.snapshots:
        if each.kind is SnapshotKind.REFUSED and each.tier != Tier.DISK:
            state.refusals.add(_refusal(fact.generation, each))


def _refusal(generation: int, fact: SnapshotFact) -> tuple[int, int, str, int]:
    return (fact.step, fact.generation, fact.node, generation)


def choose(state: State, seats: Sequence[Seat]) -> Choice | None:
    """Where the state of a generation with these `seats` comes from; None for the first one."""
    if not state.generations or state.mode is not Mode.ENFORCE:
        return None
    return choose_restore(
        {name: node.copies for name, node in state.nodes.items()},
        dict(places_of(seats)),
        [record.ancestor for record in state.generations],
        refused=_refused(state),
        checkpoint_step=state.newest_checkpoint_step,
    )


def _refused(state: State) -> set[tuple[int, int, str]]:
    """A node that refuses a snapshot loses its own part of it; in a second generation, everybody does.

    The first time its files were bad, and others may make up for them; what these made was bad as well then.
    """
    found: set[tuple[int, int, str]] = set()
    for step, generation, node, _ in sorted(state.refusals):
        found.add((step, generation, "" if (step, generation, node) in found else node))
    return found
