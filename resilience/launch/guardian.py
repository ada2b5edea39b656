"""The guardian of this node as its agent sees it: arena made, process started and kept alive, orders given.

What a guardian does is in resilience/snapshot/. Here are also the conversions between the coordinator's messages and
the guardian's own words.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

from resilience.clock import SystemClock
from resilience.config import SnapshotConfig
from resilience.context import RunContext
from resilience.errors import SnapshotError, UsageError
from resilience.events import Mode, SnapshotFact, SnapshotKind
from resilience.launch import shim
from resilience.launch.run_directory import RunDirectory
from resilience.rpc.v1 import coordinator_pb2 as pb
from resilience.snapshot import arena as arenas
from resilience.snapshot.arena import Arena
from resilience.snapshot.inventory import read_inventory
from resilience.snapshot.orders import Answer, Begin, Flush, Order, Peer, Settle, Source, encode, read

__all__ = ["Guardian", "start"]

_SERVE_S = 5.0
"""How long the first Join waits for the address at which other nodes will reach this guardian."""
_SETTLE_S = 10.0
_BEGIN_S = 5.0
_PREPARE_S = 300.0
_FLUSH_S = 9.0
"""The launcher kills agents 20 s after a signal; ranks may take 5 s of them."""
_STOP_S = 2.0
_POLL_S = 0.02
_MAX_TOLD = 256
"""Facts that are known again when a guardian that was started again tells them once more: of what is in the arena."""
_MAX_DEATHS = 5
"""In a row, without one answer in between: something is wrong that another start will not mend."""


def start(
    context: RunContext, context_path: Path, *, node: str, num_nodes: int, tell: Callable[[SnapshotFact], None]
) -> Guardian | None:
    """Make the arena and start its guardian; None where the memory tier is off.

    Args:
        context: the run.
        context_path: where the guardian finds it.
        node: this node's name.
        num_nodes: of the launch; where there are several, their guardians talk to each other.
        tell: takes what the guardian reports; called on a thread of its own.

    Raises:
        UsageError: there can be no arena where the configuration wants one.
    """
    config = context.config
    if config.mode is Mode.OFF or config.snapshot.interval_steps == 0:
        return None
    directory = config.snapshot.dir
    with contextlib.suppress(SnapshotError):
        arenas.room(directory)
        for name in arenas.remove_stale(directory):
            print(f"resilience: removed {directory / name}, which a dead run had left", file=sys.stderr)
    try:
        arena, held = arenas.make(directory, run_id=context.run_id, node=node, run_dir=context.run_dir)
    except SnapshotError as error:
        if directory != SnapshotConfig().dir:
            raise UsageError(str(error)) from None
        print(f"resilience: snapshots off: {error}", file=sys.stderr)
        return None
    guardian = Guardian(arena, held, context, context_path, node=node, num_nodes=num_nodes, tell=tell)
    guardian.keep_alive()
    return guardian


class Guardian:
    """One guardian process at a time. To be used by the main thread, whose end is what the process waits for."""

    def __init__(
        self,
        arena: Arena,
        held: int,
        context: RunContext,
        context_path: Path,
        *,
        node: str,
        num_nodes: int,
        tell: Callable[[SnapshotFact], None],
    ) -> None:
        self.arena = arena
        self._held = held
        self._context_path = context_path
        self._node = node
        self._num_nodes = num_nodes
        self._tell = tell
        self._restores = context.config.mode is Mode.ENFORCE
        self._flushes = context.config.snapshot.flush_interval_s > 0
        self._log = RunDirectory(context.run_dir).logs / f"guardian-{node}.log"
        self._clock = SystemClock()
        self._process: subprocess.Popen[bytes] | None = None
        self._answers: queue.SimpleQueue[Answer] = queue.SimpleQueue()
        self._told: collections.deque[tuple[str, int, int, str, float]] = collections.deque(maxlen=_MAX_TOLD)
        self._refused: set[tuple[int, int]] = set()
        self._number = 0
        self._num_deaths = 0
        self.restore: Path | None = None
        """What was prepared for the ranks of the current generation."""

    @property
    def pid(self) -> int | None:
        """Its process, while there is one."""
        return None if self._process is None else self._process.pid

    def keep_alive(self) -> None:
        """Call it often: starts the guardian where it does not run. All that it knows lies in the arena."""
        if self._process is not None and self._process.poll() is None:
            return
        if self._num_deaths > _MAX_DEATHS:
            return
        if self._process is not None:
            self._num_deaths += 1
            again = "starting it again" if self._num_deaths <= _MAX_DEATHS else "giving it up"
            print(f"resilience: the guardian ended with {self._process.returncode}; {again}", file=sys.stderr)
            if self._num_deaths > _MAX_DEATHS:
                return
        try:
            self._spawn()
        except OSError as error:
            # A full table of processes is no reason to end healthy ranks.
            print(f"resilience: the guardian cannot be started ({error})", file=sys.stderr)

    def address(self) -> str:
        """Where the guardians of other nodes reach this one; empty where there are none."""
        if self._num_nodes == 1:
            return ""
        deadline = self._clock.monotonic() + _SERVE_S
        while self._clock.monotonic() < deadline:
            with contextlib.suppress(OSError, ValueError):
                told = json.loads(self.arena.guardian.read_text(encoding="utf-8"))
                if told["pid"] == self.pid:
                    return str(told["address"])
            self.keep_alive()
            threading.Event().wait(_POLL_S)
        return ""

    def inventory(self) -> list[pb.SnapshotCopy]:
        """What can be restored from here."""
        return [
            pb.SnapshotCopy(
                step=copy.step,
                generation=copy.generation,
                world_size=copy.world_size,
                ranks=copy.ranks,
                clean_through=copy.clean_through,
                parity_nodes=copy.parity_nodes,
                parity_losses=copy.parity_losses,
                num_bytes=copy.num_bytes,
                at=copy.at,
            )
            for copy in read_inventory(self.arena)
            if (copy.step, copy.generation) not in self._refused
        ]

    def settle(self) -> None:
        """After the end of the ranks: have what they committed hashed, as far as that goes in some seconds."""
        self._ask(Settle(timeout_s=_SETTLE_S), timeout_s=_SETTLE_S + 1.0)

    def begin(self, assignment: pb.Assignment, *, interrupted: Callable[[], None]) -> str:
        """Before the ranks of a generation start: have ready what they load. The folder is `restore` then.

        Args:
            assignment: this node's place.
            interrupted: called while waiting; raises to give up.

        Returns:
            Why it cannot be loaded, in words; empty where all is well.
        """
        self.restore = None
        order = _begin(assignment, restores=self._restores)
        timeout_s = _BEGIN_S if order.source is None else _PREPARE_S
        answer = self._ask(order, timeout_s=timeout_s, interrupted=interrupted)
        if order.source is None:
            return ""  # without a guardian there are no snapshots; training goes on
        if answer is None:
            return f"snapshot of step {order.source.step}: the guardian of {self._node} does not answer"
        if answer.problem:
            self._refused.add((order.source.step, order.source.generation))  # also where no file of it is bad
        else:
            self.restore = Path(answer.path)
        return answer.problem

    def flush(self) -> None:
        """On preemption: have the newest snapshot written to disk, if any are to be."""
        if self._flushes:
            self._ask(Flush(timeout_s=_FLUSH_S), timeout_s=_FLUSH_S + 0.5)

    def stop(self) -> None:
        """End the guardian and remove the arena. Call it when the ranks have ended."""
        if self._process is not None:
            assert self._process.stdin is not None
            with contextlib.suppress(OSError):
                self._process.stdin.close()
            try:
                self._process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self.arena.remove()
        os.close(self._held)

    # ------

    def _ask(self, order: Order, *, timeout_s: float, interrupted: Callable[[], None] = lambda: None) -> Answer | None:
        """Give an order and wait for its answer; a guardian that dies over it is started and asked once more."""
        deadline = self._clock.monotonic() + timeout_s
        for _ in range(2):
            self.keep_alive()
            process = self._process
            if process is None or process.poll() is not None or not self._send(process, order):
                continue
            while self._clock.monotonic() < deadline:
                interrupted()
                with contextlib.suppress(queue.Empty):
                    answer = self._answers.get(timeout=_POLL_S)
                    if answer.number == self._number:
                        self._num_deaths = 0
                        return answer
                if process.poll() is not None:
                    break
        return None

    def _send(self, process: subprocess.Popen[bytes], order: Order) -> bool:
        self._number += 1
        assert process.stdin is not None
        try:
            process.stdin.write(encode(order, number=self._number))
            process.stdin.flush()
        except OSError:
            return False
        return True

    def _spawn(self) -> None:
        command = [
            *(sys.executable, "-I", "-S", shim.__file__, "exec", str(os.getpid()), str(int(signal.SIGTERM))),
            *(sys.executable, "-m", "resilience.snapshot.guardian", "--context", str(self._context_path)),
            *("--arena", str(self.arena.path), "--node", self._node),
            *(["--peers"] if self._num_nodes > 1 else []),
        ]
        # gRPC's own lines say nothing about the run; a person who looks for an error sets it otherwise.
        environment = {"GRPC_VERBOSITY": "ERROR", **os.environ}
        with self._log.open("ab") as log:
            # Its own session: what is typed at the launcher's terminal is for the agent to act on.
            self._process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
            )
        threading.Thread(target=self._listen, args=(self._process,), name="guardian", daemon=True).start()

    def _listen(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            try:
                message = read(line)
            except ValueError:
                continue  # the torn last line of a guardian that was killed
            if isinstance(message, Answer):
                self._answers.put(message)
                continue
            # One that was started again says once more what it finds. A step that was taken again is another one.
            at = message.at if message.kind is SnapshotKind.TAKEN else 0.0
            key = (message.kind, message.step, message.generation, message.reason, at)
            if key not in self._told:
                self._told.append(key)
                self._tell(message)


def _begin(assignment: pb.Assignment, *, restores: bool) -> Begin:
    num_local = len(assignment.slots)
    source = None
    if assignment.HasField("restore") and restores:
        restore = assignment.restore
        source = Source(step=restore.step, generation=restore.generation, peers=_peers(restore.peers))
    return Begin(
        generation=assignment.generation,
        world_size=assignment.world_size,
        ranks=tuple(range(assignment.first_rank, assignment.first_rank + num_local)),
        peers=_peers(assignment.peers),
        source=source,
    )


def _peers(peers: Iterable[pb.Peer]) -> tuple[Peer, ...]:
    return tuple(Peer(node=p.node, address=p.guardian_address, ranks=tuple(p.ranks)) for p in peers)
