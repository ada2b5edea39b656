"""`Machine`: the one way into the state. It owns the order of things and no rule of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from resilience.coordinator.machine import commands as c
from resilience.coordinator.machine import facts as f
from resilience.coordinator.machine import operations, rendezvous, reports, vetoes
from resilience.coordinator.machine.effects import Effect, Record
from resilience.coordinator.machine.fold import fold
from resilience.coordinator.machine.pulse import Pulse
from resilience.coordinator.machine.state import State

__all__ = ["Machine"]

_PLANNERS: dict[type, Callable[[State, Pulse, Any, float], Iterator[f.Fact]]] = {
    c.JoinAgent: rendezvous.join_agent,
    c.JoinRank: rendezvous.join_rank,
    c.Leave: rendezvous.leave,
    c.Report: reports.report,
    c.Decide: vetoes.decide,
    c.Conclude: vetoes.conclude,
    c.SetCordon: operations.set_cordon,
    c.Drain: operations.drain,
    c.AskRanks: operations.ask_ranks,
    c.ObserveRpc: operations.observe_rpc,
    c.Tick: operations.tick,
    c.Recover: operations.recover,
    c.Close: operations.close,
}


class Machine:
    """The coordinator of one run, without its input and output."""

    def __init__(self, *, now: float) -> None:
        self.state = State()
        self.pulse = Pulse(since=now, moved_at=now, sampled_at=now)

    @classmethod
    def open(cls, opened: f.Opened, *, now: float) -> tuple[Machine, list[Effect]]:
        """A new run; the effects hold the record of its beginning."""
        machine = cls(now=now)
        return machine, machine._fold(opened, now)

    def handle(self, command: c.Command, now: float) -> list[Effect]:
        """Let `command` happen at `now` (seconds since the Unix epoch, never less than before).

        Returns:
            What the shell must do, in order. Nothing may be answered before its records are durable.

        Raises:
            Refused: the command changes nothing.
        """
        effects: list[Effect] = []
        for fact in _PLANNERS[type(command)](self.state, self.pulse, command, now):
            effects += self._fold(fact, now)
        return effects

    def restore(self, fact: f.Fact, at: float) -> list[Effect]:
        """Bring back a fact from the journal. Its effects on the outside are returned to be executed again."""
        if isinstance(fact, f.GenerationBegan):
            self.pulse.begin_generation(self.pulse.since)
        return fold(self.state, fact, at)

    def note(self, fact: f.CordonSet, now: float) -> list[Effect]:
        """A fact that the shell knows by itself: the cordons that earlier jobs left behind."""
        return self._fold(fact, now)

    def _fold(self, fact: f.Fact, now: float) -> list[Effect]:
        return [Record(fact, now), *fold(self.state, fact, now)]
