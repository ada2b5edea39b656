"""Who may speak: the checks that fence off other runs, ended generations and unknown ranks."""

from __future__ import annotations

from resilience.coordinator.machine.effects import RefusalKind, Refused
from resilience.coordinator.machine.state import RankSeat, State

__all__ = ["check_generation", "check_member", "check_run", "check_running", "seat_of"]


def check_run(state: State, run_id: str) -> None:
    """Refuse another run."""
    if run_id != state.run_id:
        raise Refused(
            RefusalKind.STALE, f"this coordinator serves run {state.run_id!r}, not {run_id!r}; check the address"
        )


def check_generation(state: State, generation: int, who: str) -> None:
    """Refuse a generation that is over, or that never began."""
    if generation < state.generation:
        raise Refused(
            RefusalKind.STALE,
            f"{who} belongs to generation {generation}, which has ended; the run is in generation {state.generation}",
        )
    if generation > state.generation:
        raise Refused(
            RefusalKind.STALE,
            f"{who} speaks of generation {generation}, which has not begun; the run is in {state.generation}",
        )


def check_running(state: State) -> None:
    """Refuse while no generation runs."""
    if state.generation_ended:
        raise Refused(
            RefusalKind.STALE,
            f"generation {state.generation} has ended"
            + (f": {state.generations[-1].ended_by}" if state.generations else ""),
        )


def seat_of(state: State, rank: int | str) -> RankSeat:
    """The place of `rank` (a number, or `rank:<number>`) in the current generation."""
    kind, _, name = str(rank).rpartition(":")
    seat = state.seats.get(int(name)) if kind in ("", "rank") and name.isdecimal() else None
    if seat is None:
        raise Refused(
            RefusalKind.UNKNOWN,
            f"{rank if kind else f'rank {rank}'} is not one of the {len(state.seats)} ranks of this run",
        )
    return seat


def check_member(state: State, member: str, generation: int) -> None:
    """Refuse a report of someone who has no place. An agent lives longer than a generation."""
    kind, _, name = member.partition(":")
    if kind == "agent" and name in state.nodes and generation <= state.generation:
        return
    if kind == "agent" and name in state.nodes:
        check_generation(state, generation, member)
    if kind != "rank":
        raise Refused(RefusalKind.UNKNOWN, f"{member!r} is not a member of this run; join first")
    check_generation(state, generation, member)
    seat_of(state, member)
