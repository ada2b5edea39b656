"""Guardian processes of two, three and six nodes on loopback: killed or stopped at any moment, nodes lost and rebuilt.

Ranks are played by the test: it writes snapshots as they would. What must hold: once a snapshot is protected on all
members, the parity that counts on those that are left always brings back what a lost node wrote, byte for byte.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from resilience.context import RunContext
from resilience.events import SnapshotFact, SnapshotKind
from resilience.snapshot import arena as arenas
from resilience.snapshot.inventory import read_inventory
from resilience.snapshot.orders import Answer, Begin, Order, Peer, Source, encode, read
from tests.nodes import eventually, run_context, write_snapshot

pytestmark = [pytest.mark.integration, pytest.mark.slow]

SIZES = [3_000_000, 1, 70_000]


class GuardianProcess:
    """A guardian with its arena, and the agent's end of its streams."""

    def __init__(self, tmp_path: Path, name: str, context: RunContext, ranks: Sequence[int]) -> None:
        self.name = name
        self.ranks = tuple(ranks)
        self.arena, self._held = arenas.make(tmp_path, run_id=context.run_id, node=name, run_dir=tmp_path)
        self._context = tmp_path / f"context-{context.run_id}.json"
        context.write(self._context)
        self.log = tmp_path / f"{context.run_id}-{name}.log"
        self.facts: list[SnapshotFact] = []
        self._answers: dict[int, Answer] = {}
        self._number = 0
        self.contents: dict[int, dict[str, bytes]] = {}
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "resilience.snapshot.guardian", "--peers", "--node", self.name]
        command += ["--context", str(self._context), "--arena", str(self.arena.path)]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log)
        threading.Thread(target=self._listen, args=(self.process,), daemon=True).start()

    def _listen(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            with contextlib.suppress(ValueError):
                message = read(line)
                if isinstance(message, Answer):
                    self._answers[message.number] = message
                else:
                    self.facts.append(message)
        process.stdout.close()

    def address(self) -> str:
        told: dict[str, object] = {}

        def served() -> bool:
            with contextlib.suppress(OSError, ValueError):
                told.update(json.loads(self.arena.guardian.read_bytes()))
            assert self.process.poll() is None, self.log.read_text()
            return told.get("pid") == self.process.pid

        eventually(served, f"the address of {self.name}")
        return str(told["address"])

    def ask(self, order: Order) -> Answer:
        self._number += 1
        assert self.process.stdin is not None
        self.process.stdin.write(encode(order, number=self._number))
        self.process.stdin.flush()
        eventually(lambda: self._number in self._answers, f"the answer of {self.name}")
        return self._answers[self._number]

    def take(self, step: int, world_size: int) -> None:
        # Overwrites what nobody holds, as ranks do.
        commits = write_snapshot(self.arena, step=step, ranks=self.ranks, world_size=world_size, sizes=SIZES)
        found = {}
        for commit in commits:
            slot = self.arena.slot(commit.rank, commit.slot)
            for entry in commit.files:
                found[entry.path] = (slot / entry.path).read_bytes()
            found[f"trail-{commit.rank}.bin"] = self.arena.trail(commit.rank).read_bytes()
        self.contents[step] = found

    def peer(self) -> Peer:
        return Peer(node=self.name, address=self.address(), ranks=self.ranks)

    def protected(self) -> set[int]:
        return {fact.step for fact in self.facts if fact.kind is SnapshotKind.PROTECTED}

    def counts(self) -> set[int]:
        """Steps whose parity counts here, as the coordinator would be told."""
        return {copy.step for copy in read_inventory(self.arena) if copy.parity_losses}

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdin is not None
        self.process.stdin.close()

    def lose(self) -> None:
        self.kill()
        self.arena.remove()
        with contextlib.suppress(OSError):
            os.close(self._held)


class Run:
    """Guardians of one generation."""

    def __init__(self, tmp_path: Path, num_nodes: int, **snapshot: object) -> None:
        self.tmp_path = tmp_path
        self.context = run_context(tmp_path, **snapshot)
        self.world_size = num_nodes
        self.nodes = [GuardianProcess(tmp_path, f"worker-{i}", self.context, [i]) for i in range(num_nodes)]
        self.all = list(self.nodes)

    def begin(self) -> None:
        peers = tuple(node.peer() for node in self.nodes)
        for node in self.nodes:
            order = Begin(generation=1, world_size=self.world_size, ranks=node.ranks, peers=peers, source=None)
            assert node.ask(order).problem == ""

    def take(self, step: int) -> None:
        for node in self.nodes:
            node.take(step, self.world_size)

    def protect(self, step: int) -> None:
        def done() -> bool:
            return all(step in node.counts() for node in self.nodes)

        eventually(done, f"parity of step {step}", timeout_s=60)

    def rebuild(self, lost: Sequence[GuardianProcess], step: int) -> None:
        """Lose nodes for good; fresh ones get their places, and their files from those that are left."""
        present = [node for node in self.nodes if node not in lost]
        for node in lost:
            node.lose()
        spares = [GuardianProcess(self.tmp_path, f"spare-{n.name}", self.context, n.ranks) for n in lost]
        self.all += spares
        source = Source(step=step, generation=1, peers=tuple(node.peer() for node in present))
        peers = tuple(node.peer() for node in (*present, *spares))
        for node in (*present, *spares):
            order = Begin(generation=2, world_size=self.world_size, ranks=node.ranks, peers=peers, source=source)
            answer = node.ask(order)
            assert answer.problem == "", node.log.read_text()
            wanted = (lost[spares.index(node)] if node in spares else node).contents[step]
            for path, content in wanted.items():
                here = Path(answer.path) / path.replace("state/", f"global_step{step}/")
                assert here.read_bytes() == content, (node.name, path)

    def stop(self) -> None:
        for node in self.all:
            if node.process.poll() is None:
                node.process.send_signal(signal.SIGCONT)
                node.lose()


@contextlib.contextmanager
def guardians(tmp_path: Path, num_nodes: int, **snapshot: object) -> Iterator[Run]:
    run = Run(tmp_path, num_nodes, **snapshot)
    try:
        run.begin()
        yield run
    finally:
        run.stop()


def newest_that_counts(nodes: Sequence[GuardianProcess]) -> int:
    """What the coordinator would choose: it counts on every member that is left."""
    return max(set.intersection(*(node.counts() for node in nodes)))


@pytest.mark.parametrize(("num_nodes", "losses"), [(2, 1), (3, 1), (6, 2)])
def test_nodes_are_lost_in_mid_exchange(tmp_path: Path, num_nodes: int, losses: int) -> None:
    """Guardians are killed at random points and started again; then nodes are lost at another one."""
    chance = random.Random(num_nodes)
    with guardians(tmp_path, num_nodes, parity_losses=losses) as run:
        run.take(1)
        run.protect(1)
        for step in range(2, 5):
            run.take(step)
            threading.Event().wait(chance.uniform(0, 0.15))  # the random point
            victim = chance.choice(run.nodes)
            victim.kill()
            victim.start()
            victim.address()
        run.take(5)
        threading.Event().wait(chance.uniform(0, 0.3))
        lost = chance.sample(run.nodes, losses)
        for node in lost:
            node.kill()
        left = [node for node in run.nodes if node not in lost]
        run.rebuild(lost, newest_that_counts(left))


def test_a_peer_that_stands_still_leaves_the_older_parity(tmp_path: Path) -> None:
    with guardians(tmp_path, 2) as run:
        run.take(1)
        run.protect(1)
        run.nodes[1].process.send_signal(signal.SIGSTOP)
        run.take(2)
        eventually(lambda: 2 in {c.step for c in read_inventory(run.nodes[0].arena)}, "the hash of step 2")
        assert 2 not in run.nodes[0].counts()
        assert 1 in run.nodes[0].counts()
        run.nodes[1].process.send_signal(signal.SIGCONT)
        run.protect(2)
        run.rebuild([run.nodes[0]], 2)


def test_a_guardian_of_another_run_is_refused(tmp_path: Path) -> None:
    """It has the same token, as with an external coordinator, and is given the address of this run's guardian."""
    with guardians(tmp_path, 2) as run:
        other_context = run_context(tmp_path, run_id="other").model_copy(update={"token_file": run.context.token_file})
        other = GuardianProcess(tmp_path, "worker-9", other_context, [0])
        run.all.append(other)
        peers = (other.peer(), run.nodes[1].peer())
        order = Begin(generation=1, world_size=2, ranks=(0,), peers=peers, source=None)
        assert other.ask(order).problem == ""
        write_snapshot(other.arena, step=1, ranks=[0], world_size=2, sizes=SIZES, run_id="other")
        run.take(1)
        run.protect(1)
        eventually(lambda: "this is a guardian of run 'run'" in other.log.read_text(), "the refusal")
        assert not other.counts()
