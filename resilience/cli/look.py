"""Looking at a run again and again: what is new since the last look, and how fast it goes.

A coordinator that is silent is asked on, under its address, and its journal as soon as that tells the run's end. Draws
nothing.
"""

from __future__ import annotations

import collections
import dataclasses
import queue
import threading
from collections.abc import Callable

from resilience.cli.frame import Glance
from resilience.cli.source import Source
from resilience.clock import Clock
from resilience.errors import CoordinatorUnreachableError, ResilienceError
from resilience.rpc.codec import from_proto
from resilience.rpc.v1 import operator_pb2 as op

__all__ = ["ENDED", "Background", "Looker"]

ENDED = frozenset({"finished", "failed"})
"""States from which no run comes back."""
_NUM_DECISIONS = 32
_NUM_EVENTS = 64
_RATE_WINDOW_S = 15.0


class Looker:
    """Remembers what was seen of one run.

    Whoever answers is asked by calls that end, never by a stream: a coordinator whose host is gone ends no stream.

    Args:
        source: who answers now.
        reopen: finds who answers once that one is silent.
        clock: for the time of silence.
    """

    def __init__(self, source: Source, reopen: Callable[[], Source], clock: Clock) -> None:
        self._source = source
        self._reopen = reopen
        self._clock = clock
        self._events: collections.deque[op.Event] = collections.deque(maxlen=_NUM_EVENTS)
        self._sequence = 0
        self._samples: collections.deque[tuple[float, int, dict[int, int]]] = collections.deque()
        self._heard_at = clock.monotonic()
        self._last: Glance | None = None

    def look(self) -> Glance:
        """What the run tells now; what it told last, if nobody answers.

        Raises:
            CoordinatorUnreachableError: nobody has answered yet.
        """
        try:
            self._last = self._ask()
            self._heard_at = self._clock.monotonic()
        except CoordinatorUnreachableError:
            if self._last is None:
                raise
            silent_s = self._clock.monotonic() - self._heard_at
            self._last = self._from_another() or self._silent(self._last, silent_s)
        return self._last

    def _ask(self) -> Glance:
        run = self._source.run()
        for event in self._source.events(after=self._sequence, follow=False):
            self._events.append(event)
            self._sequence = event.sequence
        ranks = self._source.ranks().ranks
        return Glance(
            run=run,
            ranks=ranks,
            decisions=[from_proto(one) for one in self._source.decisions(limit=_NUM_DECISIONS).decisions],
            snapshots=self._source.snapshots().snapshots,
            events=tuple(self._events),
            steps_per_s=self._measured(run, {rank.rank: rank.step for rank in ranks}),
            is_live=self._source.is_live,
        )

    def _from_another(self) -> Glance | None:
        """What a coordinator at another address tells, or the journal once it tells the run's end."""
        try:
            found = self._reopen()
            if not found.is_live and found.run().state not in ENDED:
                return None
        except CoordinatorUnreachableError:
            return None
        self._source.close()
        self._source = found
        try:
            return self._ask()
        except CoordinatorUnreachableError:
            return None

    @staticmethod
    def _silent(last: Glance, silent_s: float) -> Glance:
        return dataclasses.replace(last, steps_per_s={}, silent_s=max(silent_s, 1e-3))

    def _measured(self, run: op.Run, steps: dict[int, int]) -> dict[int, float]:
        """Steps per second of each rank over the last seconds; a new generation or a step back starts it afresh."""
        samples = self._samples
        if samples:
            _, generation, before = samples[-1]
            if generation != run.generation or any(steps.get(rank, 0) < step for rank, step in before.items()):
                samples.clear()
        samples.append((run.now, run.generation, steps))
        while len(samples) > 2 and run.now - samples[0][0] > _RATE_WINDOW_S:
            samples.popleft()
        began, _, first = samples[0]
        elapsed_s = run.now - began
        if elapsed_s < 1.0:
            return {}
        return {rank: (step - first[rank]) / elapsed_s for rank, step in steps.items() if rank in first}


class Background:
    """Looks again and again on a thread of its own: a coordinator that is silent keeps nobody's keys waiting.

    Args:
        looker: who looks; nobody else may use it from now on.
        interval_s: seconds between the end of a look and the next.
    """

    def __init__(self, looker: Looker, interval_s: float) -> None:
        self._looker = looker
        self._interval_s = interval_s
        self._seen: queue.SimpleQueue[Glance | ResilienceError] = queue.SimpleQueue()
        self._stopped = threading.Event()
        # A call that nobody answers must not keep the process from ending.
        threading.Thread(target=self._look, name="look", daemon=True).start()

    def stop(self) -> None:
        """Look no more."""
        self._stopped.set()

    def new(self) -> Glance | None:
        """What was seen since the last call; None if nothing was.

        Raises:
            ResilienceError: looking has failed for good.
        """
        newest = None
        while not self._seen.empty():
            newest = self._seen.get()
        if isinstance(newest, ResilienceError):
            raise newest
        return newest

    def _look(self) -> None:
        while not self._stopped.wait(self._interval_s):
            try:
                self._seen.put(self._looker.look())
            except ResilienceError as error:
                self._seen.put(error)
                return
