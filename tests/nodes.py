"""Nodes of a run on this machine: arenas with snapshots that no rank took, and what their guardians do for parity."""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from resilience.clock import SystemClock
from resilience.config import Config, SnapshotConfig
from resilience.context import RunContext
from resilience.events import SnapshotFact, SnapshotKind
from resilience.snapshot import arena as arenas
from resilience.snapshot.arena import Arena, write_atomically
from resilience.snapshot.hashing import hash_part
from resilience.snapshot.holds import Holds, read_holds
from resilience.snapshot.inventory import read_commits, read_inventory
from resilience.snapshot.manifest import Commit, FileEntry, Manifest, Record, serialise_commit, serialise_manifest
from resilience.snapshot.orders import Begin, Peer, Source
from resilience.snapshot.redundancy import Redundancy

TOKEN = "a token that is long enough"
NUM_SLOTS = 5


def eventually(met: Callable[[], bool], what: str, timeout_s: float = 120.0) -> None:
    """Wait for a condition."""
    clock = SystemClock()
    deadline = clock.monotonic() + timeout_s
    while not met():
        assert clock.monotonic() < deadline, f"still waiting for {what}"
        threading.Event().wait(0.01)


def run_context(tmp_path: Path, *, run_id: str = "run", **snapshot: object) -> RunContext:
    """A run with a token."""
    token_file = tmp_path / f"token-{run_id}"
    token_file.touch(mode=0o600)
    token_file.write_text(TOKEN if run_id == "run" else f"{TOKEN} of {run_id}")
    config = Config(snapshot=SnapshotConfig.model_validate({"dir": tmp_path, **snapshot}))
    return RunContext(
        run_id=run_id, run_dir=tmp_path, coordinator_address="127.0.0.1:1", token_file=token_file, config=config
    )


def write_snapshot(
    arena: Arena,
    *,
    step: int,
    ranks: Sequence[int],
    world_size: int,
    sizes: Sequence[int],
    sequence: int = 1,
    seed: int = 0,
    run_id: str = "run",
) -> list[Commit]:
    """What ranks would write: files with random bytes, a trail, a commit."""
    commits = []
    for rank in ranks:
        source = random.Random(f"{seed} {step} {rank} {sequence}")
        slot = _free_slot(arena, rank, step)
        arena.state(rank, slot).mkdir(parents=True, exist_ok=True)
        arena.commit(rank, slot).unlink(missing_ok=True)
        files = []
        for index, size in enumerate(sizes):
            name = f"state/zero_pp_rank_{rank}_{index}.pt"
            (arena.slot(rank, slot) / name).write_bytes(source.randbytes(size))
            record = (Record(name="data/0", offset=size // 4, size=size // 2),)
            files.append(FileEntry(path=name, size=size, records=record))
        trail = arena.trail(rank)
        trail.write_bytes((trail.read_bytes() if trail.exists() else b"") + source.randbytes(100 + rank))
        commit = Commit(
            run_id=run_id, generation=1, step=step, rank=rank, world_size=world_size, slot=slot, sequence=sequence,
            at=float(step), clean_through=step, blocked_s=0.0, random={}, counters={"global_steps": step},
            trail_bytes=trail.stat().st_size, files=tuple(files),
        )  # fmt: skip
        write_atomically(arena.commit(rank, slot), serialise_commit(commit))
        commits.append(commit)
    return commits


def _free_slot(arena: Arena, rank: int, step: int) -> int:
    """As a rank chooses: the slot of the same step, one that was never used, or the oldest that nobody holds."""
    steps = {slot: commit.step for (of, slot), commit in read_commits(arena).items() if of == rank}
    held = {hold.step for hold in read_holds(arena)}
    unused = [slot for slot in range(NUM_SLOTS) if slot not in steps]
    same = [slot for slot, at in steps.items() if at == step]
    free = sorted((at, slot) for slot, at in steps.items() if at not in held)
    return (same or unused or [slot for _, slot in free])[0]


def publish(arena: Arena, node: str, commits: Sequence[Commit]) -> Manifest:
    """What a guardian does with it."""
    first = commits[0]
    manifest = Manifest(
        run_id="run", generation=first.generation, step=first.step, world_size=first.world_size, node=node,
        at=first.at, clean_through=first.step,
        parts=tuple(hash_part(c, arena.slot(c.rank, c.slot), arena.trail(c.rank)) for c in commits),
    )  # fmt: skip
    write_atomically(arena.manifest(first.step, first.generation), serialise_manifest(manifest))
    return manifest


class Node:
    """One node: its arena, and the thread side of its guardian, in this process."""

    def __init__(self, tmp_path: Path, name: str, context: RunContext, *, ranks: Sequence[int]) -> None:
        self.name = name
        self.ranks = tuple(ranks)
        self.context = context
        self.arena, self._held = arenas.make(tmp_path, run_id=context.run_id, node=name, run_dir=tmp_path)
        self.facts: list[SnapshotFact] = []
        self.manifests: dict[int, Manifest] = {}
        self.redundancy = self._new()
        self.address = ""

    def _new(self) -> Redundancy:
        return Redundancy(self.arena, self.context, node=self.name, holds=Holds(self.arena), tell=self.facts.append)

    def start(self) -> None:
        self.address = self.redundancy.start()
        write_atomically(self.arena.guardian, f'{{"pid": 1, "address": "{self.address}"}}'.encode())

    def stop(self) -> None:
        self.redundancy.stop()

    def start_again(self) -> None:
        """As a guardian that was killed is started again."""
        self.redundancy.stop()
        self.redundancy = self._new()
        self.start()

    def lose(self) -> None:
        """The node is gone with all it held."""
        self.stop()
        self.arena.remove()

    def take(self, step: int, *, sizes: Sequence[int], world_size: int, sequence: int = 1, seed: int = 0) -> None:
        commits = write_snapshot(
            self.arena, step=step, ranks=self.ranks, world_size=world_size, sizes=sizes, sequence=sequence, seed=seed
        )
        self.manifests[step] = publish(self.arena, self.name, commits)

    def peer(self, *, holds: bool = True) -> Peer:
        return Peer(node=self.name, address=self.address, ranks=self.ranks if holds else ())

    def protected(self) -> list[int]:
        return [fact.step for fact in self.facts if fact.kind is SnapshotKind.PROTECTED]

    def inventory(self) -> dict[int, tuple[tuple[str, ...], int]]:
        return {copy.step: (copy.parity_nodes, copy.parity_losses) for copy in read_inventory(self.arena)}

    def contents(self, step: int, rank: int) -> dict[str, bytes]:
        """The files of a rank, and its trail as `trail`."""
        commit = self.manifests[step].part(rank).commit
        slot = self.arena.slot(rank, commit.slot)
        files = {entry.path: (slot / entry.path).read_bytes() for entry in commit.files}
        return {**files, "trail": self.arena.trail(rank).read_bytes()[: commit.trail_bytes]}


class Cluster:
    """Several nodes in one generation."""

    def __init__(self, tmp_path: Path, num_nodes: int, *, ranks_each: int = 1, **snapshot: object) -> None:
        self.tmp_path = tmp_path
        self.context = run_context(tmp_path, **snapshot)
        self.world_size = num_nodes * ranks_each
        self.nodes = [
            Node(tmp_path, f"worker-{i}", self.context, ranks=range(i * ranks_each, (i + 1) * ranks_each))
            for i in range(num_nodes)
        ]
        for node in self.nodes:
            node.start()

    def begin(self, generation: int = 1) -> None:
        peers = tuple(node.peer() for node in self.nodes)
        for node in self.nodes:
            order = Begin(generation=generation, world_size=self.world_size, ranks=node.ranks, peers=peers, source=None)
            node.redundancy.begin(order)

    def take(self, step: int, sizes: Sequence[Sequence[int]], *, sequence: int = 1, seed: int = 0) -> None:
        """A snapshot on all nodes; each has the next of `sizes`, round and round."""
        for index, node in enumerate(self.nodes):
            node.take(step, sizes=sizes[index % len(sizes)], world_size=self.world_size, sequence=sequence, seed=seed)

    def protect(self, step: int) -> None:
        eventually(lambda: all(step in node.protected() for node in self.nodes), f"parity of step {step}")

    def order(self, node: Node, step: int, *, present: Sequence[Node], generation: int = 2) -> Begin:
        """What the coordinator would tell `node` after the others were lost."""
        source = Source(step=step, generation=1, peers=tuple(each.peer() for each in present))
        return Begin(
            generation=generation,
            world_size=self.world_size,
            ranks=node.ranks,
            peers=tuple(each.peer() for each in (*present, node)),
            source=source,
        )

    def stop(self) -> None:
        for node in self.nodes:
            node.stop()
            node.arena.remove()


@contextlib.contextmanager
def cluster(tmp_path: Path, num_nodes: int, **options: object) -> Iterator[Cluster]:
    nodes = Cluster(tmp_path, num_nodes, **options)  # type: ignore[arg-type]
    try:
        nodes.begin()
        yield nodes
    finally:
        nodes.stop()
