"""The guardian of one node: `python -m resilience.snapshot.guardian`. It outlives the ranks and dies with its agent.

It takes orders from its agent on standard input (resilience/snapshot/orders.py) and never imports torch. All that it
knows lies in the arena, so that a guardian which was killed is simply started again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from resilience.clock import SystemClock
from resilience.context import RunContext
from resilience.errors import ExitCode, ResilienceError, SnapshotError
from resilience.events import SnapshotFact, SnapshotKind
from resilience.snapshot.arena import Arena, write_atomically
from resilience.snapshot.flush import Flusher
from resilience.snapshot.holds import RESTORE, Holds
from resilience.snapshot.manifest import Hold
from resilience.snapshot.orders import Answer, Begin, Flush, Settle, decode, write
from resilience.snapshot.prepare import clear, prepare
from resilience.snapshot.redundancy import Redundancy
from resilience.snapshot.watch import Watch, go_back

__all__ = ["main"]


class _Ended(BaseException):
    """SIGTERM: the agent is gone, or wants this process gone."""


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until the agent closes standard input or dies; then nothing of the arena is left."""
    parser = argparse.ArgumentParser(prog="python -m resilience.snapshot.guardian")
    parser.add_argument("--context", type=Path, required=True)
    parser.add_argument("--arena", type=Path, required=True)
    parser.add_argument("--node", required=True)
    parser.add_argument("--peers", action="store_true", help="the run has other nodes, whose guardians call this one")
    arguments = parser.parse_args(argv)
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
    arena = Arena(arguments.arena)
    try:
        context = RunContext.read(arguments.context)
        held = arena.hold()
    except ResilienceError as error:
        print(f"resilience: guardian: {error}", file=sys.stderr)
        return error.exit_code
    is_agent_gone = False
    guardian = None
    try:
        signal.signal(signal.SIGTERM, _end)
        guardian = _Guardian(arena, context, node=arguments.node, has_peers=arguments.peers)
        guardian.serve()
        is_agent_gone = True  # or it wants no guardian any more
    except ResilienceError as error:
        print(f"resilience: guardian: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        # What ranks have committed stays: the next guardian may find room again.
        print(f"resilience: guardian: {error}; is {arena.path.parent} full?", file=sys.stderr)
        return ExitCode.FAILED
    except _Ended:
        # Whoever else ends a guardian does not end the run: its agent starts another one.
        owner = arena.owner()
        is_agent_gone = owner is None or os.getppid() != owner.pid
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if guardian is not None:
            guardian.stop()
        if is_agent_gone:
            arena.remove()
        os.close(held)
    return 0


def _end(number: int, frame: FrameType | None) -> None:
    raise _Ended


class _Guardian:
    """Reads orders and carries them out; what needs no order is done by the threads that it starts."""

    def __init__(self, arena: Arena, context: RunContext, *, node: str, has_peers: bool) -> None:
        self._arena = arena
        self._context = context
        self._node = node
        self._output = threading.Lock()
        self._holds = Holds(arena)
        self._watch = Watch(arena, run_id=context.run_id, node=node, holds=self._holds, tell=self._say)
        self._flusher = Flusher(
            arena,
            context.config.snapshot,
            run_id=context.run_id,
            run_dir=context.run_dir,
            node=node,
            holds=self._holds,
            newest=lambda: self._watch.newest,
            tell=self._say,
        )
        self._redundancy: Redundancy | None = None
        if has_peers:
            self._redundancy = Redundancy(arena, context, node=node, holds=self._holds, tell=self._say)

    def serve(self) -> None:
        """Carry out orders, until the agent closes the stream."""
        address = "" if self._redundancy is None else self._redundancy.start()
        content = json.dumps({"pid": os.getpid(), "address": address}).encode()
        write_atomically(self._arena.guardian, content)
        self._watch.start()
        self._flusher.start()
        for line in iter(sys.stdin.buffer.readline, b""):
            number, order = decode(line)
            match order:
                case Begin():
                    answer = self._begin_if_there_is_room(number, order)
                case Settle():
                    self._watch.settle(order.timeout_s)
                    answer = Answer(number=number)
                case Flush():
                    self._watch.settle(order.timeout_s / 2)
                    path, problem = self._flusher.flush_now(order.timeout_s / 2)
                    answer = Answer(number=number, path=path, problem=problem)
            self._say(answer)

    def stop(self) -> None:
        """End the threads."""
        self._watch.stop()
        self._flusher.stop()
        if self._redundancy is not None:
            self._redundancy.stop()

    def _begin_if_there_is_room(self, number: int, order: Begin) -> Answer:
        try:
            return self._begin(number, order)
        except OSError as error:
            problem = f"{self._node}: generation {order.generation} cannot be prepared ({error})"
            if order.source is not None:
                self._refuse(order, problem)
            else:
                print(f"resilience: guardian: {problem}", file=sys.stderr, flush=True)
            return Answer(number=number, problem=problem)

    def _begin(self, number: int, order: Begin) -> Answer:
        source = order.source
        self._flusher.begin(order.generation, order.ranks)
        with self._watch.paused(), contextlib.ExitStack() as at_end:
            go_back(self._arena, order.generation, None if source is None else source.step)
            at_end.callback(self._watch.begin, order)
            if self._redundancy is not None:
                self._redundancy.begin(order)
            self._holds.drop(RESTORE)
            clear(self._arena)
            if source is None:
                return Answer(number=number)
            self._holds.add(Hold(source.step, RESTORE, source.generation))
            remote = None if self._redundancy is None else self._redundancy.remote(order)
            if remote is not None:
                at_end.callback(remote.close)
            try:
                folder = prepare(
                    self._arena,
                    order,
                    run_id=self._context.run_id,
                    node=self._node,
                    remote=remote,
                    on_damage=lambda reason: self._refuse(order, reason),
                )
            except SnapshotError as error:
                self._holds.drop(RESTORE)
                self._refuse(order, str(error))
                return Answer(number=number, problem=str(error))
        return Answer(number=number, path=str(folder))

    def _refuse(self, order: Begin, reason: str) -> None:
        source = order.source
        assert source is not None
        print(f"resilience: guardian: {reason}", file=sys.stderr, flush=True)
        fact = SnapshotFact(
            kind=SnapshotKind.REFUSED,
            step=source.step,
            generation=source.generation,
            node=self._node,
            world_size=order.world_size,
            reason=reason,
            at=SystemClock().wall(),
        )
        self._say(fact)

    def _say(self, message: Answer | SnapshotFact) -> None:
        with self._output, contextlib.suppress(BrokenPipeError):
            sys.stdout.buffer.write(write(message))
            sys.stdout.buffer.flush()


if __name__ == "__main__":
    sys.exit(main())
