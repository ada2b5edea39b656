"""Snapshots of a real engine, copied beside the next forward and backward; prints what was found as JSON lines.

One rank on its GPU. Where there is none the device is one that copies when it is waited for, to try this worker itself.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import nn

from resilience.config import Config
from resilience.deepspeed.adapter import EngineAdapter
from resilience.deepspeed.snapshot_load import load, read_prepared, resume_randomness
from resilience.deepspeed.snapshot_take import Taker
from resilience.guard.settings import Settings
from resilience.guard.snapshots import RankSnapshots
from resilience.snapshot.archive import as_bytes
from resilience.snapshot.arena import Arena, make, write_atomically
from resilience.snapshot.copiers import Copier, StreamCopier, copier_for
from resilience.snapshot.hashing import hash_part
from resilience.snapshot.inventory import read_commits
from resilience.snapshot.manifest import Commit, Manifest, serialise_manifest
from resilience.snapshot.orders import Begin, Source
from resilience.snapshot.prepare import prepare

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "integration" / "workers"))
from ending import leave
from late_streams import LateStreams

HAS_GPU = torch.cuda.is_available()
WIDTH, NUM_LAYERS = (1536, 8) if HAS_GPU else (32, 2)
"""On a GPU about 260 MB of state: copying it takes longer than launching the forward beside it."""
RUN, TAKEN_AT, LAST = "gpu", 3, 6

Contents = dict[str, dict[str, bytes]]


class Model(nn.Module):
    """Linear layers with batch statistics between them, which each forward changes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(NUM_LAYERS))
        self.norms = nn.ModuleList(nn.BatchNorm1d(WIDTH, affine=False) for _ in range(NUM_LAYERS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer, norm in zip(self.layers, self.norms, strict=True):
            # DeepSpeed may have changed the type of the statistics, or not; batch_norm takes one type only.
            x = x + norm(layer(x).to(norm.running_mean.dtype)).to(x.dtype).relu()
        return x.float().square().mean()


def build_engine(zero: int) -> Any:
    torch.manual_seed(7)
    model = Model()
    config = {
        "train_micro_batch_size_per_gpu": 16,
        "gradient_accumulation_steps": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": zero},
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1_000_000,
    }
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    return engine


def train(engine: Any, step: int) -> list[float]:
    losses = []
    for micro_step in range(2):
        generator = torch.Generator().manual_seed(100 * step + micro_step)
        samples = torch.randn(16, WIDTH, generator=generator).to(engine.device, torch.bfloat16)
        loss = engine(samples)
        engine.backward(loss)
        engine.step()
        losses.append(float(loss))
    return losses


class Rank:
    """One engine with snapshots around it, as the guard has them."""

    def __init__(self, zero: int, directory: Path) -> None:
        make(directory, run_id=RUN, node="here", run_dir=directory)
        self.arena = Arena.of(directory, run_id=RUN, node="here")
        self.engine = build_engine(zero)
        self.adapter = EngineAdapter(self.engine)
        self.said: list[str] = []
        self.copier: Copier = copier_for(self.engine.device) if HAS_GPU else StreamCopier(LateStreams())
        self.snapshots = RankSnapshots(
            self.engine,
            self.arena,
            Settings(run_id=RUN, generation=1, rank=0, node="here", device="here/0", config=Config()),
            world_size=1,
            num_local_ranks=1,
            keeps_parity=False,
            rng=self.adapter,
            copier=self.copier,
            on_off=self.said.append,
            on_waiting=self.said.append,
        )
        self.adapter.wrap(
            forward=after(self.snapshots.before_forward, self.adapter.forward),
            backward=self.adapter.backward,
            take_model_step=after(self.snapshots.finish, self.adapter.take_model_step),
            step=self.adapter.step,
        )
        self._reader = Taker(self.engine)

    def take(self, step: int) -> None:
        assert self.snapshots.can_take
        self.snapshots.take(step, clean_through=max(0, step - 2))

    def contents(self) -> Contents:
        """What a snapshot is to hold, from the engine; waits for the device."""
        return {
            path: {name: as_bytes(storage).cpu().numpy().tobytes() for name, storage in image.storages}
            for path, image in self._reader.collect().items()
        }

    def commit(self, step: int) -> Commit:
        (found,) = (commit for commit in read_commits(self.arena).values() if commit.step == step)
        return found

    def differences(self, step: int, expected: Contents) -> list[str]:
        """Records of the snapshot of a step that are not what was expected."""
        commit = self.commit(step)
        slot = self.arena.slot(0, commit.slot)
        found = []
        for entry in commit.files:
            content = (slot / entry.path).read_bytes()
            found += [
                f"{entry.path} {record.name}"
                for record in entry.records
                if content[record.offset : record.offset + record.size] != expected[entry.path][record.name]
            ]
        return found

    def load(self, step: int) -> None:
        commit = self.commit(step)
        part = hash_part(commit, self.arena.slot(0, commit.slot), self.arena.trail(0))
        manifest = Manifest(
            run_id=RUN, generation=1, step=step, world_size=1, node="here", at=0.0, clean_through=0, parts=(part,)
        )
        write_atomically(self.arena.manifest(step, 1), serialise_manifest(manifest))
        source = Source(step=step, generation=1, peers=())
        order = Begin(generation=2, world_size=1, ranks=(0,), peers=(), source=source)
        folder = prepare(self.arena, order, run_id=RUN, node="here")
        load_checkpoint = functools.partial(type(self.engine).load_checkpoint, self.engine)
        load(self.engine, folder, read_prepared(folder), rank=0, load_checkpoint=load_checkpoint)
        resume_randomness(part, source=str(folder))
        shutil.rmtree(folder)


def after(first: Callable[[], None], then: Callable[..., Any]) -> Callable[..., Any]:
    def both(*args: Any, **kwargs: Any) -> Any:
        first()
        return then(*args, **kwargs)

    return both


@contextlib.contextmanager
def a_rank(zero: int) -> Iterator[Rank]:
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="resilience-test-") as directory:
        rank = Rank(zero, Path(directory))
        try:
            yield rank
        finally:
            rank.snapshots.close()
            rank.engine.destroy()


def examine(zero: int) -> dict[str, Any]:
    """Taken at each step; what the files hold, what comes of loading them, and what is left behind."""
    found: dict[str, Any] = {"case": f"zero{zero}"}
    with a_rank(zero) as rank:
        at_end: dict[int, Contents] = {}
        losses: list[float] = []
        pending = []
        different = []
        for step in range(1, LAST + 1):
            taken = train(rank.engine, step)
            losses += taken if step > TAKEN_AT else []
            if step - 1 in at_end:
                different += rank.differences(step - 1, at_end[step - 1])
            at_end[step] = rank.contents()
            rank.take(step)
            pending.append(step not in rank.snapshots.steps())
        rank.snapshots.finish()
        found |= {"pending": pending, "different": different + rank.differences(LAST, at_end[LAST])}
        found["blocked_s"] = [commit.blocked_s for commit in read_commits(rank.arena).values()]
        rank.snapshots.rewound(TAKEN_AT + 1)
        rank.load(TAKEN_AT + 1)
        found["loaded"] = rank.contents() == at_end[TAKEN_AT + 1]
        again = [loss for step in range(TAKEN_AT + 2, LAST + 1) for loss in train(rank.engine, step)]
        found["course"] = (again == losses[2:], rank.contents() == at_end[LAST])
        found["beneath"] = beneath(rank)
        found["sizes"] = growth(rank)
        found["said"] = rank.said
    return found


def beneath(rank: Rank) -> dict[str, Any]:
    """A weight that is written to while it is copied, and one snapshot later nothing of the kind."""
    rank.take(LAST + 1)
    rank.snapshots.before_forward()
    next(iter(rank.engine.module.parameters())).data.view(-1)[5:6].add_(1.0)
    first = next(iter(rank.engine.optimizer.optimizer.state))
    first.data.view(-1)[5:6].add_(1.0)
    rank.snapshots.finish()
    lost, steps = rank.snapshots.lost_step, rank.snapshots.steps()
    at_end = rank.contents()
    rank.take(LAST + 2)
    rank.snapshots.finish()
    return {"lost": lost, "is_there": LAST + 1 in steps, "next": rank.differences(LAST + 2, at_end)}


def growth(rank: Rank) -> list[tuple[int, int, int, int]]:
    """Bytes on the device, of this process, of the arena, and locked pieces, after 20 and after 100 snapshots."""
    sizes = []
    for number in range(1, 101):
        rank.take(LAST + 2 + number)
        rank.snapshots.before_forward()
        rank.snapshots.finish()
        if number in (20, 100):
            arena = sum(path.stat().st_blocks * 512 for path in rank.arena.path.rglob("*") if path.is_file())
            resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            device = torch.cuda.memory_allocated() if HAS_GPU else 0
            assert isinstance(rank.copier, StreamCopier)
            sizes.append((device, resident, arena, len(rank.copier._locked)))
    return sizes


def main() -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    deepspeed.init_distributed()
    for zero in (0, 1, 2, 3):
        print(json.dumps(examine(zero)), flush=True)
    leave()


if __name__ == "__main__":
    main()
