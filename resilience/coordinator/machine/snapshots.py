"""Memory snapshots as the coordinator knows them: what nodes told of them, and which one a generation begins from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from resilience.coordinator.machine.facts import Reported, Seat
from resilience.coordinator.machine.state import State, places_of
from resilience.events import Action, Decision, Mode, OrderAnswer, Outcome, SnapshotFact, SnapshotKind
from resilience.policy import Choice, Tier, choose_restore

__all__ = ["CLEAN", "choose", "go_back", "is_expected", "is_news", "newest_steps", "note", "on_the_path"]

CLEAN = "clean"
"""Beside the tiers: the newest snapshot that is known to be clean."""

Told = Mapping[tuple[int, int], Mapping[tuple[str, SnapshotKind], SnapshotFact]]
"""(step, generation) -> (node, kind) -> what was told last."""


def is_news(state: State, generation: int, fact: SnapshotFact) -> bool:
    """Whether `fact`, told by a member of `generation`, is not known yet."""
    if fact.kind is SnapshotKind.LOADED:
        return _loaded(state, generation, fact) not in state.loaded_snapshots
    if fact.kind is SnapshotKind.REFUSED:
        return fact.tier != Tier.DISK and _refusal(generation, fact) not in state.refusals
    return False


def note(state: State, fact: Reported) -> None:
    """What members told of memory snapshots."""
    state.loaded_snapshots += [
        _loaded(state, fact.generation, each) for each in fact.snapshots if each.kind is SnapshotKind.LOADED
    ]
    for each in fact.snapshots:
        if each.kind is SnapshotKind.REFUSED and each.tier != Tier.DISK:
            state.refusals.add(_refusal(fact.generation, each))


def _loaded(state: State, generation: int, fact: SnapshotFact) -> SnapshotFact:
    """With the tier that was chosen: the rank that loads finds files prepared, wherever they came from."""
    choice = state.generations[generation - 1].restore
    return fact if choice is None else dataclasses.replace(fact, tier=str(choice.tier))


def is_expected(state: State, answer: OrderAnswer) -> bool:
    """Whether this is the first answer to an order of this run."""
    return any(
        answer.directive_id == f"{wish}-{asked.number}" and asked.answer is None for wish, asked in state.asked.items()
    )


def go_back(state: State, choice: Choice | None) -> None:
    """A generation begins: guardians drop what was taken after the snapshot that it begins from, or all."""
    if choice is None or not choice.is_snapshot:
        for tier in (Tier.MEMORY, Tier.PEER, CLEAN):
            state.snapshot_steps.pop(tier, None)
        return
    for tier in (Tier.MEMORY, Tier.PEER, CLEAN):
        if tier in state.snapshot_steps:
            state.snapshot_steps[tier] = min(state.snapshot_steps[tier], choice.step)


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


def on_the_path(state: State, step: int, generation: int, *, at: float) -> bool:
    """Whether ranks and guardians have kept a snapshot: every later generation began from it or a later one of the same
    past, and no rewind since has gone back behind it.

    Args:
        state: the run.
        step: of the snapshot.
        generation: that took it.
        at: when it was taken, in seconds since the Unix epoch.
    """
    is_past = all(
        record.restore is not None and record.restore.is_snapshot and record.restore.step >= step
        for record in state.generations
        if record.generation > generation
    )
    return is_past and not any(
        decision.generation == generation and decision.decided_at > at and _went_behind(state, decision, step)
        for decision in state.decisions.values()
        if decision.action is Action.REWIND and decision.outcome is Outcome.SUCCEEDED
    )


def _went_behind(state: State, decision: Decision, step: int) -> bool:
    evidence = state.evidence.get(decision.decision_id)
    return evidence is not None and evidence.rewind_step is not None and evidence.rewind_step < step


def newest_steps(state: State, told: Told) -> dict[str, int]:
    """Step of the newest snapshot by tier, as far as all nodes told of their parts; `CLEAN` among them."""
    nodes = {name for name, _ in state.generations[-1].places} if state.generations else set()
    found: dict[str, int] = {}
    clean_through = max((fact.clean_through for facts in told.values() for fact in facts.values()), default=0)
    for (step, generation), facts in told.items():
        kinds = {kind: {node for node, of in facts if of is kind} for kind in SnapshotKind}
        if kinds[SnapshotKind.FLUSHED]:
            found[Tier.DISK] = max(step, found.get(Tier.DISK, 0))
        at = max((fact.at for fact in facts.values() if fact.kind is SnapshotKind.TAKEN), default=0.0)
        if not nodes <= kinds[SnapshotKind.TAKEN] or not on_the_path(state, step, generation, at=at):
            continue
        tiers = [Tier.MEMORY, *([Tier.PEER] if nodes <= kinds[SnapshotKind.PROTECTED] else [])]
        for tier in (*tiers, *([CLEAN] if step <= clean_through else [])):
            found[tier] = max(step, found.get(tier, 0))
    return {str(tier): step for tier, step in found.items()}
