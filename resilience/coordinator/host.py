"""The machine with its memory on disk: one command at a time, its effects executed in their order.

Journal first, then the device history, then whoever waits is woken; only after that does the caller see an answer. A
journal that cannot be written ends the process: what is not durable must not be promised, and the ranks go on by
themselves until a coordinator comes back.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable
from typing import Protocol

from resilience.clock import Clock
from resilience.coordinator.devices import DeviceHistory
from resilience.coordinator.journal import Journal, JournalError, replay
from resilience.coordinator.machine import Machine
from resilience.coordinator.machine import commands as c
from resilience.coordinator.machine.effects import Effect, Finish, Record, RememberCordon, RememberFault
from resilience.coordinator.machine.facts import CordonSet, Fact, Opened, Sampled
from resilience.coordinator.machine.state import State

__all__ = ["Host", "Observer"]


class Observer(Protocol):
    """Who wants to know what happened, after it is durable. Nothing that it does may change anything, or fail."""

    def note(self, fact: Fact, at: float, state: State) -> None:
        """`fact` happened `at`; `state` is what followed."""


class Host:
    """Owns the machine, the journal and the device history. Lives on one event loop and is not thread-safe."""

    def __init__(
        self, machine: Machine, journal: Journal, history: DeviceHistory, clock: Clock, offset_s: float
    ) -> None:
        self.machine = machine
        self.history = history
        self.journal = journal
        self._clock = clock
        self._offset_s = offset_s
        self._changed = asyncio.Event()
        self.finished = asyncio.Event()
        self.observers: list[Observer] = []
        """Told of every fact from now on, but not of those that were read back from the journal."""
        self.num_lines_recorded = 0
        """Lines of the run's story that an earlier process has told already."""
        self.broken: JournalError | None = None
        """Why this process must end: the journal cannot be written."""

    @classmethod
    def start(cls, opened: Opened, journal: Journal, history: DeviceHistory, clock: Clock, *, pid: int) -> Host:
        """Open a new run, or come back to the one that the journal holds.

        Raises:
            JournalError: the journal cannot be read or written, or holds another run.
        """
        recorded = replay(journal, now=clock.wall())
        # Time never goes back within a run, whatever the wall clock does: it is the wall clock at the start (or the
        # newest fact's, if that is later) and goes on with the monotonic one.
        offset_s = max(clock.wall(), recorded.last_at) - clock.monotonic()
        if recorded.num_facts == 0:
            machine, effects = Machine.open(opened, now=clock.monotonic() + offset_s)
            host = cls(machine, journal, history, clock, offset_s)
            host._execute(effects)
            host._adopt_cordons()
            return host
        if recorded.machine.state.run_id != opened.run_id:
            raise JournalError(
                f"journal {journal.path} holds run {recorded.machine.state.run_id!r}, not {opened.run_id!r}"
            )
        host = cls(recorded.machine, journal, history, clock, offset_s)
        host.num_lines_recorded = recorded.machine.state.num_lines
        host._execute(recorded.effects)
        host.submit(c.Recover(pid=pid))
        return host

    def now(self) -> float:
        """Seconds since the Unix epoch; never goes back."""
        return self._clock.monotonic() + self._offset_s

    def monotonic(self) -> float:
        """For durations of calls."""
        return self._clock.monotonic()

    def submit(self, command: c.Command) -> None:
        """Let `command` happen; when this returns, what followed from it is durable.

        Raises:
            Refused: it changes nothing.
            JournalError: nothing can be promised any more; `broken` is set.
        """
        if self.broken is not None:
            raise self.broken
        self._execute(self.machine.handle(command, self.now()))

    async def changed(self, timeout_s: float) -> None:
        """Wait until something happened that others may wait for, or `timeout_s` seconds."""
        event = self._changed
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(event.wait(), timeout_s)

    def _execute(self, effects: Iterable[Effect]) -> None:
        effects = list(effects)
        records = [effect for effect in effects if isinstance(effect, Record)]
        try:
            self.journal.append(records)
        except JournalError as error:
            self.broken = error
            self.finished.set()
            raise
        for effect in effects:
            self._execute_outside(effect)
        for record in records:
            for observer in self.observers:
                observer.note(record.fact, record.at, self.machine.state)
        if any(not isinstance(record.fact, Sampled) for record in records):
            self._changed.set()
            self._changed = asyncio.Event()

    def _execute_outside(self, effect: Effect) -> None:
        if isinstance(effect, RememberFault):
            self.history.remember_fault(self.machine.state.run_id, effect)
        elif isinstance(effect, RememberCordon):
            self.history.remember_cordon(effect)
        elif isinstance(effect, Finish):
            self.finished.set()

    def _adopt_cordons(self) -> None:
        """Tell the machine what earlier jobs have left out of use."""
        for record in self.history.records():
            if record.cordoned:
                fact = CordonSet(
                    devices=((record.device, record.node),), cordoned=True, reason=record.reason, by="history"
                )
                self._execute(self.machine.note(fact, self.now()))
