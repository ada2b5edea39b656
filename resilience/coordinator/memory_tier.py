"""What the memory tier did for a run, off its state: for the report and the metrics. Pure."""

from __future__ import annotations

import collections
from typing import Any

from resilience.coordinator.machine.snapshots import CLEAN
from resilience.coordinator.machine.state import State
from resilience.events import Action, CheckpointFact, CheckpointKind, Decision, Outcome, SnapshotFact
from resilience.policy import Tier

__all__ = ["num_restores", "snapshot_summary"]


def snapshot_summary(state: State, blocked_s: float) -> dict[str, Any]:
    """The `snapshots` of the report.

    Args:
        state: the run.
        blocked_s: seconds that training waited for copies, mean of the ranks.
    """
    newest = dict(state.snapshot_steps)
    clean = newest.pop(CLEAN, None)
    return {
        "num_taken": state.telemetry.num_snapshots,
        "interval_steps": state.snapshot_interval_steps,
        "blocked_s": round(blocked_s, 6),
        "newest_step": dict(sorted(newest.items())),
        "newest_clean_step": clean,
        "rewinds": [_rewind(state, d) for d in _rewinds(state)],
        "restores": _restores(state),
        "num_steps_lost": state.telemetry.num_repeated_steps,
    }


def num_restores(state: State) -> collections.Counter[tuple[str, ...]]:
    """Restores of the run by (tier, outcome). Every rank loads its part, and each refuses for itself: rank 0 stands for
    those that succeeded, and what was refused counts once."""
    restores: collections.Counter[tuple[str, ...]] = collections.Counter()
    restores.update((fact.tier, "succeeded") for fact in state.loaded_snapshots)
    restores.update((str(Tier.DISK), "succeeded") for _ in state.loaded_checkpoints)
    refused = {
        (point.generation, point.directory, point.tag)
        for point in state.checkpoints
        if point.kind is CheckpointKind.REFUSED
    }
    restores.update((str(Tier.DISK), "refused") for _ in refused)
    restores.update((_tier_of(state, step, generation, by), "refused") for step, generation, _, by in state.refusals)
    return restores


def _tier_of(state: State, step: int, generation: int, refused_by: int) -> str:
    """Where a snapshot would have come from for the generation that refused it; others of the arena are refused with
    it."""
    choice = state.generations[refused_by - 1].restore if 0 < refused_by <= len(state.generations) else None
    is_it = choice is not None and (choice.step, choice.generation) == (step, generation)
    return str(choice.tier) if is_it and choice is not None else str(Tier.MEMORY)


def _rewinds(state: State) -> list[Decision]:
    found = [d for d in state.decisions.values() if d.action is Action.REWIND and d.outcome is not Outcome.SUPERSEDED]
    return sorted(found, key=lambda decision: decision.decided_at)


def _rewind(state: State, decision: Decision) -> dict[str, Any]:
    evidence = state.evidence.get(decision.decision_id)
    to_step = None if evidence is None else evidence.rewind_step
    return {
        "decision_id": decision.decision_id,
        "tier": str(Tier.MEMORY),
        "step": decision.step,
        "to_step": to_step,
        "outcome": str(decision.outcome),
        "seconds": decision.lost_s,
        "num_steps_again": None if to_step is None else max(0, decision.step - 1 - to_step),
    }


def _restores(state: State) -> list[dict[str, Any]]:
    """Those that succeeded, oldest first. `seconds` is what loading and verifying took."""
    facts: list[tuple[str, SnapshotFact | CheckpointFact]] = [
        *((fact.tier, fact) for fact in state.loaded_snapshots),
        *((str(Tier.DISK), point) for point in state.loaded_checkpoints),
    ]
    return [
        {"tier": tier, "step": fact.step, "generation": fact.generation, "seconds": fact.seconds, "at": fact.at}
        for tier, fact in sorted(facts, key=lambda pair: pair[1].at)
    ]
