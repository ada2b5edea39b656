"""A run in memory whose facts go to observers, as those of a coordinator's process do."""

from __future__ import annotations

from collections.abc import Sequence

from resilience.coordinator.host import Observer
from resilience.coordinator.machine.effects import Effect, Record
from resilience.events import Action
from resilience.testing import FakeRun, detection


class ObservedRun(FakeRun):
    """Facts go to `observers` once they are journaled."""

    observers: Sequence[Observer] = ()

    def _keep(self, effects: Sequence[Effect]) -> None:
        super()._keep(effects)
        for effect in effects:
            for observer in self.observers if isinstance(effect, Record) else ():
                observer.note(effect.fact, effect.at, self.machine.state)

    def hurt_and_restarted(self) -> None:
        """An alarm that was mended in place, one that a replay mends at step 2, a rank that dies after 3, a restart."""
        self.start()
        self.train(until=1)
        self.report("rank:1", detections=(detection(step=2, rank=1, number=77, mended=True),))
        self.script.at(step=2, rank=1).alarms(times=1)
        self.train(until=3)
        self.restart(from_step=3, exits=[self.exit_of(1, -9, message="bus error")])
        self.train(until=6)
        assert [d.action for d in self.state.decisions.values()] == [Action.REPLAY, Action.CONTINUE, Action.RESTART]
