"""Ranks and guardians killed at random points: what is offered, prepared and on disk is whole.

The ranks are played by processes that write as ranks do (workers/snapshot_writer.py). Nothing here needs torch.
"""

from __future__ import annotations

import array
import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from resilience.checkpoint.publish import read_latest
from resilience.checkpoint.verify import State, inspect, locate
from resilience.errors import CheckpointError
from resilience.events import SnapshotFact, SnapshotKind
from resilience.snapshot import arena as arenas
from resilience.snapshot.hashing import verify_file, verify_trail
from resilience.snapshot.holds import read_holds
from resilience.snapshot.inventory import read_inventory, read_manifest
from resilience.snapshot.orders import Answer, Begin, Order, Peer, Settle, Source, encode, read
from tests.nodes import eventually, run_context

pytestmark = [pytest.mark.integration]

WRITER = Path(__file__).parent / "workers" / "snapshot_writer.py"
RANKS = (0, 1)
NUM_SLOTS = 4


class Node:
    """An agent's view of one guardian, and the processes that play its ranks."""

    def __init__(self, directory: Path, **snapshot: object) -> None:
        context = run_context(directory, **snapshot)
        self.arena, self._held = arenas.make(directory, run_id="run", node="here", run_dir=directory)
        self._context = directory / "context.json"
        context.write(self._context)
        self._log = (directory / "guardian.log").open("ab")
        self.generation = 0
        self.step = 0
        self.facts: list[SnapshotFact] = []
        self._answers: dict[int, Answer] = {}
        self._number = 0
        self.ranks: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "resilience.snapshot.guardian", "--node", "here"]
        command += ["--context", str(self._context), "--arena", str(self.arena.path)]
        self.guardian = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, bufsize=0
        )
        threading.Thread(target=self._listen, args=(self.guardian,), daemon=True).start()

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

    def send(self, order: Order) -> int:
        self._number += 1
        assert self.guardian.stdin is not None
        self.guardian.stdin.write(encode(order, number=self._number))
        return self._number

    def ask(self, order: Order) -> Answer:
        number = self.send(order)
        eventually(lambda: number in self._answers, f"the answer to {order}")
        return self._answers[number]

    def next_generation(self, source: Source | None) -> Begin:
        self.generation += 1
        return Begin(generation=self.generation, world_size=2, ranks=RANKS, peers=(), source=source)

    def run_ranks(self) -> None:
        numbers = [self.generation, len(RANKS), NUM_SLOTS, self.step]
        self.ranks = subprocess.Popen([sys.executable, str(WRITER), str(self.arena.path), *map(str, numbers)])

    def kill_ranks(self) -> None:
        if self.ranks is not None:
            self.ranks.kill()
            self.ranks.wait()

    def kill_guardian(self) -> None:
        self.guardian.kill()
        self.guardian.wait()
        assert self.guardian.stdin is not None
        self.guardian.stdin.close()

    def close(self) -> None:
        self.kill_ranks()
        self.kill_guardian()
        self._log.close()
        os.close(self._held)
        self.arena.remove()

    def offered(self) -> list[Source]:
        """What the coordinator would be told, after looking that every word of it is what it should be."""
        sources = []
        for copy in read_inventory(self.arena):
            manifest = read_manifest(self.arena, copy.step, copy.generation)
            assert manifest is not None
            assert manifest.ranks == RANKS
            for part in manifest.parts:
                slot = self.arena.slot(part.commit.rank, part.commit.slot)
                for entry in part.commit.files:
                    verify_file(slot / entry.path, entry)
                    assert_filled(slot / entry.path, copy.step)
                verify_trail(self.arena.trail(part.commit.rank), part)
            peer = Peer(node="here", address="", ranks=RANKS)
            sources.append(Source(step=copy.step, generation=copy.generation, peers=(peer,)))
        return sources


def assert_filled(path: Path, step: int) -> None:
    assert set(array.array("q", path.read_bytes())) == {step}, f"{path} is torn"


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    made = Node(tmp_path)
    yield made
    made.close()


def published(node: Node, at_least: int) -> bool:
    return any(generation == node.generation and step >= at_least for step, generation in node.arena.published())


@pytest.mark.slow
def test_killed_anywhere_nothing_torn_is_offered(node: Node) -> None:
    chance = random.Random(4)
    source: Source | None = None
    num_restored = 0
    for point in range(50):
        order = node.next_generation(source)
        number = node.send(order)
        if source is not None and chance.random() < 0.2:
            time.sleep(chance.random() * 0.02)  # in mid-prepare, or before, or after
            node.kill_guardian()
            assert not [name for name in node.arena.path.glob("restore-g*") if not (name / "snapshot.json").exists()]
            node.start()
            number = node.send(order)
        eventually(lambda: number in node._answers, "the generation's beginning")  # noqa: B023 - asked at once
        answer = node._answers[number]
        assert answer.problem == ""
        if source is not None:
            num_restored += 1
            for rank in RANKS:
                assert_filled(Path(answer.path) / f"global_step{source.step}/zero_pp_rank_{rank}.pt", source.step)
            node.step = source.step
        node.run_ranks()
        eventually(lambda: published(node, node.step + chance.randrange(1, 4)), "a snapshot of this generation")
        time.sleep(chance.random() * 0.1)
        if chance.random() < 0.5:
            node.kill_guardian()
            time.sleep(chance.random() * 0.02)
            node.kill_ranks()
            node.offered()
            node.start()
        else:
            node.kill_ranks()
        assert node.ask(Settle(timeout_s=20)).problem == ""
        offered = node.offered()
        assert offered, f"nothing is offered after point {point}, where something had been published"
        newest = offered[-1]
        assert newest.generation == node.generation
        source = None if chance.random() < 0.1 else newest
        if source is None:
            node.step = newest.step
    assert num_restored > 30
    assert not [fact for fact in node.facts if fact.kind is SnapshotKind.REFUSED]


@pytest.fixture
def flushing(tmp_path: Path) -> Iterator[Node]:
    """A node whose guardian writes one checkpoint after the other, each slowly enough to be struck."""
    made = Node(tmp_path, flush_interval_s=0.01, flush_mib_per_s=4.0)
    yield made
    made.close()


def newest_on_disk(folder: Path) -> int:
    """Step of the checkpoint that a load would take, after looking that none that could be taken is torn."""
    if not folder.exists():
        return 0
    for seen in inspect(folder, read_files=True):
        if seen.state is State.PUBLISHED:
            assert seen.good, seen.problems
            for rank in RANKS:
                assert_filled(folder / seen.tag / f"zero_pp_rank_{rank}.pt", seen.step)
    with contextlib.suppress(CheckpointError):
        return int(locate(folder).name.removeprefix("global_step"))
    return 0


@pytest.mark.slow
@pytest.mark.parametrize("num_points", [12, pytest.param(50, marks=pytest.mark.long)])
def test_killed_while_it_writes_to_disk_no_checkpoint_is_torn(flushing: Node, tmp_path: Path, num_points: int) -> None:
    node, folder, chance = flushing, tmp_path / "snapshots", random.Random(7)
    source: Source | None = None
    on_disk = num_cut_short = 0
    for point in range(num_points):
        assert node.ask(node.next_generation(source)).problem == ""
        node.step = source.step if source is not None else 0
        node.run_ranks()
        begun = f".flush-run-g{node.generation}-*"
        eventually(lambda: list(folder.glob(begun)), "a checkpoint that is being written")  # noqa: B023 - at once
        if chance.random() < 0.3:
            before = read_latest(folder)
            eventually(lambda: read_latest(folder) != before, "a checkpoint")  # noqa: B023 - at once
        time.sleep(chance.random() * 0.3)
        node.kill_guardian()
        node.kill_ranks()
        num_cut_short += bool(list(folder.glob(begun)))
        found = newest_on_disk(folder)
        assert found >= on_disk, f"point {point}: the checkpoint of step {on_disk} is gone, and {found} is the newest"
        on_disk = found
        node.start()
        assert node.ask(Settle(timeout_s=20)).problem == ""
        source = node.offered()[-1]
    assert num_cut_short > num_points / 4
    assert on_disk > 0, "some were published, too"
    stages = {path.name for path in folder.glob(".flush-*")}
    assert len(stages) <= 2, f"what older generations had begun goes: {stages}"


def test_what_ranks_load_is_held_until_they_went_on(node: Node) -> None:
    node.ask(node.next_generation(None))
    node.run_ranks()
    eventually(lambda: published(node, 3), "a snapshot")
    node.kill_ranks()
    node.ask(Settle(timeout_s=20))
    source = node.offered()[-1]
    answer = node.ask(node.next_generation(source))
    assert [(hold.step, hold.why) for hold in read_holds(node.arena)] == [(source.step, "restore")]
    node.kill_guardian()
    node.start()  # the hold outlives it
    node.step = source.step
    node.run_ranks()
    eventually(lambda: published(node, source.step + 2), "snapshots of the next generation")
    eventually(lambda: not Path(answer.path).exists(), "the end of what was prepared")
    assert "restore" not in {hold.why for hold in read_holds(node.arena)}


def test_a_guardian_that_somebody_ends_leaves_the_arena_to_the_next_one(node: Node) -> None:
    node.ask(node.next_generation(None))
    node.guardian.send_signal(signal.SIGTERM)
    assert node.guardian.wait(10) == 0
    node.kill_guardian()  # closes the stream
    assert node.arena.manifests.is_dir()
    node.start()
    assert node.guardian.stdin is not None
    node.ask(node.next_generation(None))
    node.guardian.stdin.close()  # this is how its agent ends it
    assert node.guardian.wait(10) == 0
    assert not node.arena.path.exists()


def test_one_that_is_full_says_so_and_goes_on(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    node.ask(node.next_generation(None))
    node.arena.manifests.rmdir()  # as good as full: nothing can be published
    node.run_ranks()
    log = Path(node._log.name)
    eventually(lambda: "snapshots are not published" in log.read_text(), "a line")
    node.arena.manifests.mkdir()
    eventually(lambda: published(node, 1), "a snapshot")
    assert log.read_text().count("snapshots are not published") == 1
