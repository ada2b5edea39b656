"""Takes snapshots of real engines, trains on, loads them, and trains the same steps again; writes JSON lines.

One rank of two. Every case runs in the same two processes: importing torch and DeepSpeed takes longer than training.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ending import leave
from late_streams import LateStreams
from matrix_cases import Case
from matrix_worker import build_engine, is_equal, state_of, train_step

from resilience.config import Config
from resilience.deepspeed.adapter import EngineAdapter
from resilience.deepspeed.snapshot_load import load, read_prepared, resume_randomness
from resilience.errors import SnapshotError
from resilience.guard.settings import Settings
from resilience.guard.snapshots import RankSnapshots
from resilience.snapshot.archive import Image, as_bytes
from resilience.snapshot.arena import Arena, make, write_atomically
from resilience.snapshot.copiers import Copier, StreamCopier
from resilience.snapshot.hashing import hash_part
from resilience.snapshot.inventory import read_commits
from resilience.snapshot.manifest import Commit, Manifest, Record, serialise_manifest
from resilience.snapshot.orders import Begin, Source
from resilience.snapshot.prepare import prepare, tag_of

CASES = [
    *(
        Case(name=f"zero{zero}-{precision}", zero=zero, precision=precision)
        for zero in (0, 1, 2, 3)
        for precision in ("fp32", "bf16")
    ),
    Case(name="zero3-bf16-sharded", zero=3, sharded=True),
    Case(name="zero2-bf16-offload", zero=2, offload=True),
    Case(name="zero1-bf16-gpt2", zero=1, model="gpt2"),
]
LATE = [
    *(Case(name=f"late-zero{zero}-bf16", zero=zero) for zero in (0, 1, 2, 3)),
    Case(name="late-zero3-sharded", zero=3, sharded=True),
    Case(name="late-statistics", zero=2, precision="fp32", model="convolution", backward="outside"),
]
TAKEN_AT, LAST = 3, 5
RUN = "snapshots"


class Memory:
    """The arena of both ranks, and what a guardian would do with it."""

    def __init__(self, directory: Path) -> None:
        if dist.get_rank() == 0:
            make(directory, run_id=RUN, node="here", run_dir=directory)
        dist.barrier()
        self.arena = Arena.of(directory, run_id=RUN, node="here")
        self.off: list[str] = []

    def snapshots(self, engine: Any, copier: Copier | None = None, **config: Any) -> RankSnapshots:
        settings = Settings(
            run_id=RUN,
            generation=1,
            rank=dist.get_rank(),
            node="here",
            device="cpu",
            config=Config.model_validate({"snapshot": {"interval_steps": 1, **config}}),
        )
        return RankSnapshots(
            engine,
            self.arena,
            settings,
            world_size=2,
            num_local_ranks=2,
            keeps_parity=False,
            rng=EngineAdapter(engine),
            copier=copier,
            on_off=self.off.append,
        )

    def prepare(self, step: int) -> tuple[Path, Manifest]:
        dist.barrier()
        if dist.get_rank() == 0:
            commits = sorted((c for c in read_commits(self.arena).values() if c.step == step), key=lambda c: c.rank)
            parts = tuple(hash_part(c, self.arena.slot(c.rank, c.slot), self.arena.trail(c.rank)) for c in commits)
            manifest = Manifest(
                run_id=RUN, generation=1, step=step, world_size=2, node="here", at=0.0, clean_through=0, parts=parts
            )
            write_atomically(self.arena.manifest(step, 1), serialise_manifest(manifest))
            source = Source(step=step, generation=1, peers=())
            order = Begin(generation=2, world_size=2, ranks=(0, 1), peers=(), source=source)
            prepare(self.arena, order, run_id=RUN, node="here")
        dist.barrier()
        folder = self.arena.restore(2)
        return folder, read_prepared(folder)


@contextlib.contextmanager
def memory() -> Iterator[Memory]:
    names = [tempfile.mkdtemp(dir="/dev/shm", prefix="resilience-test-") if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(names, src=0)
    try:
        yield Memory(Path(names[0]))
        dist.barrier()
    finally:
        if dist.get_rank() == 0:
            shutil.rmtree(names[0])


def take(snapshots: RankSnapshots, step: int, clean_through: int = 0) -> None:
    assert snapshots.can_take
    snapshots.wants(step)
    snapshots.take(step, clean_through=clean_through)


def train(case: Case, engine: Any, first: int) -> tuple[list[int], list[float]]:
    losses: list[float] = []
    for step in range(first, LAST + 1):
        losses += [float(loss) for loss in train_step(case, engine, step)]
    return state_of(engine), losses


def check(case: Case) -> dict[str, Any]:
    """In the same engine after more training, and in a fresh one: both must go on as if nothing had been."""
    engine = build_engine(case)
    found: dict[str, Any] = {"case": case.name}
    rank = dist.get_rank()
    with memory() as mine:
        snapshots = mine.snapshots(engine)
        for step in range(1, TAKEN_AT + 1):
            train_step(case, engine, step)
            take(snapshots, step)
        at_snapshot = state_of(engine)
        expected = train(case, engine, TAKEN_AT + 1)
        for name, target in (("live", engine), ("fresh", build_engine(case))):
            folder, manifest = mine.prepare(TAKEN_AT)
            load(target, folder, manifest, rank=rank, load_checkpoint=target.load_checkpoint)
            resume_randomness(manifest.part(rank), source=str(folder))
            found[f"{name}_state"] = is_equal(state_of(target), at_snapshot)
            found[f"{name}_course"] = is_equal(train(case, target, TAKEN_AT + 1), expected)
        folder, manifest = mine.prepare(TAKEN_AT)
        found["flipped"] = refusals(engine, folder, manifest)
        snapshots.close()
    found["off"] = mine.off
    engine.destroy()
    return found


def refusals(engine: Any, folder: Path, manifest: Manifest) -> list[str]:
    """What is said when a byte of a file differs, file by file; "" where nothing was noticed."""
    said = []
    for path in sorted((folder / tag_of(manifest.step)).iterdir()):
        for place in (100, path.stat().st_size // 2, path.stat().st_size - 3):
            flip(path, place)
            try:
                load(engine, folder, manifest, rank=dist.get_rank(), load_checkpoint=engine.load_checkpoint)
                said.append("")
            except SnapshotError as error:
                said.append(str(error))
            flip(path, place)
    return said


def flip(path: Path, place: int) -> None:
    dist.barrier()
    if dist.get_rank() == 0:
        with path.open("r+b") as file:
            file.seek(place)
            byte = file.read(1)[0]
            file.seek(place)
            file.write(bytes([byte ^ 4]))
    dist.barrier()


def late(case: Case) -> dict[str, Any]:
    """Copied when the next step is about to be taken, and not before: is it still the state of the step before?"""
    engine = build_engine(case)
    copier = StreamCopier(LateStreams())
    with memory() as mine:
        snapshots = mine.snapshots(engine, copier)
        train_step(case, engine, 1)
        undo = wait_before_steps(engine, snapshots)
        at_end = {path: contents(image) for path, image in snapshots._taker.collect().items()}
        take(snapshots, 1)
        pending = snapshots.steps()
        late_bytes = sum(len(target) for target, _ in copier._late)
        train_step(case, engine, 2)
        undo()
        commits = own_commits(mine)
        found = {
            "case": case.name,
            "pending": pending,
            "whole": [commit.step for commit in commits],
            "lost": snapshots.lost_step,
            "late_bytes": late_bytes,
            "all_bytes": sum(len(content) for contents in at_end.values() for content in contents.values()),
            "different": differences(mine, commits, at_end),
            "off": mine.off,
        }
        snapshots.close()
    engine.destroy()
    return found


def wait_before_steps(engine: Any, snapshots: RankSnapshots) -> Callable[[], None]:
    """What the guard does around an engine."""
    adapter = EngineAdapter(engine)

    def forward(*args: Any, **kwargs: Any) -> Any:
        snapshots.before_forward()
        return adapter.forward(*args, **kwargs)

    def take_model_step(*args: Any, **kwargs: Any) -> Any:
        snapshots.finish()
        return adapter.take_model_step(*args, **kwargs)

    return adapter.wrap(forward=forward, backward=adapter.backward, take_model_step=take_model_step, step=adapter.step)


def contents(image: Image) -> dict[str, bytes]:
    return {name: as_bytes(storage).numpy().tobytes() for name, storage in image.storages}


def own_commits(mine: Memory) -> list[Commit]:
    return [commit for commit in read_commits(mine.arena).values() if commit.rank == dist.get_rank()]


def differences(mine: Memory, commits: list[Commit], expected: dict[str, dict[str, bytes]]) -> list[str]:
    """Records of these snapshots that are not what was expected."""
    return [
        f"{entry.path} {record.name}"
        for commit in commits
        for entry in commit.files
        for record in entry.records
        if read(mine.arena.slot(commit.rank, commit.slot) / entry.path, record) != expected[entry.path][record.name]
    ]


def read(path: Path, record: Record) -> bytes:
    with path.open("rb") as file:
        file.seek(record.offset)
        return file.read(record.size)


def growth() -> dict[str, Any]:
    """A thousand snapshots of a small engine: what they leave behind."""
    case = Case(name="growth", zero=1, precision="fp32")
    engine = build_engine(case)
    with memory() as mine:
        snapshots = mine.snapshots(engine)
        train_step(case, engine, 1)
        sizes = []
        for number in range(1, 1001):
            take(snapshots, number, clean_through=number - 2)
            if number in (20, 1000):
                sizes.append((resident_bytes(), bytes_below(mine.arena.path), len(os.listdir("/proc/self/fd"))))
        snapshots.close()
    engine.destroy()
    return {"case": "growth", "sizes": sizes}


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def bytes_below(folder: Path) -> int:
    dist.barrier()
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


def no_room() -> dict[str, Any]:
    """More slots than memory can hold: one line, no snapshot, and no rank waits for another."""
    case = Case(name="room", zero=1, precision="fp32")
    engine = build_engine(case)
    with memory() as mine:
        snapshots = mine.snapshots(engine, slots=100_000)
        train_step(case, engine, 1)
        take(snapshots, 1)
        found = {"case": "room", "off": mine.off, "can_take": snapshots.can_take, "steps": snapshots.steps()}
        snapshots.close()
    engine.destroy()
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--only", default="")
    arguments = parser.parse_args()
    torch.use_deterministic_algorithms(True)
    import deepspeed

    deepspeed.init_distributed("gloo")
    lines = [check(case) for case in CASES if arguments.only in case.name]
    lines += [late(case) for case in LATE if arguments.only in case.name]
    if not arguments.only:
        lines += [growth(), no_room()]
    if dist.get_rank() == 0:
        arguments.output.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    leave()


if __name__ == "__main__":
    main()
