"""`scripts/bench snapshot`: what a memory snapshot costs, beside a copy of as many bytes and beside other ways to save.

Everything is measured in one process, round by round in turn, so that a busy machine is busy for all of them. The cases
of saving and of restoring are tables; each case is a function that returns seconds. On a GPU a snapshot is copied
beside the step that follows, and blocks for as long as that has to wait; memcpy is a copy into page-locked memory.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import json
import logging
import os
import platform
import shutil
import signal
import socket
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from result_file import result_file

__all__ = ["main"]

WIDTH = 1024
BYTES_PER_PARAMETER = 14
"""bf16 weight, fp32 master and two moments."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timed:
    """One way to save or to restore, round by round."""

    name: str
    blocked_s: list[float]
    """How long training waits."""
    durable_s: list[float]
    """Until all of it is where it is meant to be; the same where nothing happens in the background."""


def build(mib: int, batch: int) -> tuple[Any, Callable[[], None]]:
    """An engine of one rank (bf16, ZeRO 2) with about `mib` MiB of state, and its training step."""
    import deepspeed  # late: `--help` needs none of it
    import torch

    num_layers = max(1, round(mib * 2**20 / BYTES_PER_PARAMETER / WIDTH**2))
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(num_layers)))
    config = {
        "train_micro_batch_size_per_gpu": batch,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 2},
        "steps_per_print": 1_000_000_000,
    }
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    samples = torch.randn(batch, WIDTH).to(engine.device, torch.bfloat16)

    def step() -> None:
        engine.backward(engine(samples).float().pow(2).mean())
        engine.step()

    step()
    return engine, step


class Ours:
    """Memory snapshots of the engine, in an arena of their own, and the folder that a restore loads from."""

    def __init__(self, engine: Any, directory: Path) -> None:
        from resilience.config import Config
        from resilience.deepspeed.adapter import EngineAdapter
        from resilience.guard.settings import Settings
        from resilience.guard.snapshots import RankSnapshots, num_slots
        from resilience.snapshot.arena import Arena
        from resilience.snapshot.copiers import copier_for

        self.engine = engine
        adapter = EngineAdapter(engine)
        self.arena = Arena(directory)
        settings = Settings(
            run_id="bench", generation=1, rank=0, node="here", device="here/0", config=Config(), clock=_clock()
        )
        self.num_slots = num_slots(settings.config.snapshot, keeps_parity=False)
        self.snapshots = RankSnapshots(
            engine,
            self.arena,
            settings,
            world_size=1,
            num_local_ranks=1,
            keeps_parity=False,
            rng=adapter,
            copier=copier_for(engine.device),
            on_off=_fail,
            on_waiting=_fail,
        )
        adapter.wrap(
            forward=_after(self.snapshots.before_forward, adapter.forward),
            backward=adapter.backward,
            take_model_step=_after(self._finish, adapter.take_model_step),
            step=adapter.step,
        )
        self._whole_at = 0.0

    def take(self) -> None:
        assert self.snapshots.can_take, "no slot is free"
        step = int(self.engine.global_steps)
        self.snapshots.take(step, clean_through=max(0, step - 2))

    def take_beside(self, step: Callable[[], None]) -> tuple[float, float]:
        """Take one with the step that follows it: what of that is waiting, and the time until it is whole."""
        before, began_at = self.snapshots.blocked_s, time.perf_counter()
        self.take()
        step()
        return self.snapshots.blocked_s - before, self._whole_at - began_at

    def _finish(self) -> None:
        self.snapshots.finish()
        self._whole_at = time.perf_counter()

    def prepare(self) -> None:
        """Bring the newest snapshot together as a guardian does, hashed."""
        from resilience.snapshot.hashing import hash_part
        from resilience.snapshot.inventory import read_commits
        from resilience.snapshot.manifest import STATE, Manifest
        from resilience.snapshot.prepare import tag_of

        self.snapshots.finish()
        commit = max(read_commits(self.arena).values(), key=lambda each: each.step)
        slot = self.arena.slot(0, commit.slot)
        part = hash_part(commit, slot, self.arena.trail(0))
        self.manifest = Manifest(
            run_id=commit.run_id,
            generation=commit.generation,
            step=commit.step,
            world_size=1,
            node="here",
            at=commit.at,
            clean_through=commit.clean_through,
            parts=(part,),
        )
        self.folder = self.arena.restore(2)
        for entry in commit.files:
            target = self.folder / tag_of(commit.step) / Path(entry.path).relative_to(STATE)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.link(slot / entry.path, target)
        self.num_bytes = commit.num_bytes

    def load(self) -> None:
        from resilience.deepspeed.snapshot_load import load

        load_checkpoint = functools.partial(type(self.engine).load_checkpoint, self.engine)
        load(self.engine, self.folder, self.manifest, rank=0, load_checkpoint=load_checkpoint)


def state_of(engine: Any) -> dict[str, Any]:
    """The live tensors that a checkpoint holds, flat, for those who save state dicts."""
    import torch

    found = {f"weight.{name}": parameter.data for name, parameter in engine.module.named_parameters()}
    for number, (master, state) in enumerate(engine.optimizer.optimizer.state.items()):
        found[f"master.{number}"] = master.data
        found |= {f"{key}.{number}": value for key, value in state.items() if isinstance(value, torch.Tensor)}
    return found


def _after(first: Callable[[], None], then: Callable[..., Any]) -> Callable[..., Any]:
    def both(*args: Any, **kwargs: Any) -> Any:
        first()
        return then(*args, **kwargs)

    return both


def memory_copy(num_bytes: int, directory: Path, device: Any) -> Callable[[], tuple[float, float]]:
    """One copy of so many bytes into a file on tmpfs that has its memory already, or from a GPU into page-locked
    memory: what nobody can beat."""
    import mmap

    import numpy as np
    import torch

    if device.type == "cuda":
        pinned = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
        on_device = torch.ones(num_bytes, dtype=torch.uint8, device=device)
        return timed(lambda: pinned.copy_(on_device))
    path = directory / "memcpy"
    with path.open("w+b") as file:
        os.posix_fallocate(file.fileno(), 0, num_bytes)
        mapped = mmap.mmap(file.fileno(), num_bytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
    target = np.frombuffer(mapped, dtype=np.uint8)
    source = np.ones(num_bytes, dtype=np.uint8)
    return timed(lambda: np.copyto(target, source))


def timed(work: Callable[[], object]) -> Callable[[], tuple[float, float]]:
    """`work`, with its time twice: it blocks until all is done."""

    def run() -> tuple[float, float]:
        _settle()
        began_at = time.perf_counter()
        work()
        _settle()
        seconds = time.perf_counter() - began_at
        return seconds, seconds

    return run


def in_background(begin: Callable[[], Callable[[], object]]) -> Callable[[], tuple[float, float]]:
    """`begin` returns once training may go on, and returns what waits for the rest."""

    def run() -> tuple[float, float]:
        _settle()
        began_at = time.perf_counter()
        wait = begin()
        blocked_s = time.perf_counter() - began_at
        wait()
        return blocked_s, time.perf_counter() - began_at

    return run


def _settle() -> None:
    """Return when the device has done what it was given."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def savers(ours: Ours, disk: Path, step: Callable[[], None]) -> dict[str, Callable[[], tuple[float, float]]]:
    """What saves, by name."""
    from torch.distributed.checkpoint.state_dict_saver import async_save

    engine = ours.engine

    def deepspeed_save() -> None:
        type(engine).save_checkpoint(engine, str(disk / "deepspeed"), tag="state", save_latest=False)

    def dcp_async_save() -> Callable[[], object]:
        shutil.rmtree(disk / "dcp", ignore_errors=True)
        saving = async_save(state_of(engine), checkpoint_id=str(disk / "dcp"))
        assert isinstance(saving, concurrent.futures.Future), "no stager was asked for"
        return saving.result

    found = {
        "memory snapshot": timed(ours.take) if engine.device.type == "cpu" else lambda: ours.take_beside(step),
        "DeepSpeed save_checkpoint": timed(deepspeed_save),
        "DCP async_save": in_background(dcp_async_save),
    }
    if importlib.util.find_spec("torchsnapshot") is not None:
        torchsnapshot = importlib.import_module("torchsnapshot")

        def torchsnapshot_take() -> Callable[[], object]:
            shutil.rmtree(disk / "torchsnapshot", ignore_errors=True)
            state = torchsnapshot.StateDict(**state_of(engine))
            taking = torchsnapshot.Snapshot.async_take(str(disk / "torchsnapshot"), {"state": state})
            return functools.partial(taking.wait)

        found["TorchSnapshot async_take"] = in_background(torchsnapshot_take)
    return found


def restorers(ours: Ours, disk: Path) -> dict[str, Callable[[], tuple[float, float]]]:
    """What restores, by name. Ours verifies the files before and the engine after; nobody else does."""
    import torch
    from torch.distributed.checkpoint.state_dict_loader import load

    engine = ours.engine
    files = sorted(path for path in (disk / "deepspeed" / "state").iterdir() if path.suffix == ".pt")

    def torch_load() -> None:
        for path in files:
            torch.load(path, weights_only=False)

    def deepspeed_load() -> None:
        type(engine).load_checkpoint(engine, str(disk / "deepspeed"), tag="state")

    found = {
        "memory snapshot, verified twice": timed(ours.load),
        "torch.load, not into the engine": timed(torch_load),
        "DeepSpeed load_checkpoint": timed(deepspeed_load),
        "DCP load": timed(lambda: load(state_of(engine), checkpoint_id=str(disk / "dcp"))),
    }
    if (disk / "torchsnapshot").is_dir():
        torchsnapshot = importlib.import_module("torchsnapshot")

        snapshot = torchsnapshot.Snapshot(str(disk / "torchsnapshot"))
        found["TorchSnapshot restore"] = timed(
            lambda: snapshot.restore({"state": torchsnapshot.StateDict(**state_of(engine))})
        )
    return found


def in_turn(
    cases: dict[str, Callable[[], tuple[float, float]]], rounds: int, between: Callable[[], None]
) -> list[Timed]:
    """Each case once in each round; the first round warms up and does not count."""
    results = {name: Timed(name=name, blocked_s=[], durable_s=[]) for name in cases}
    for number in range(rounds + 1):
        between()
        for name, run in cases.items():
            blocked_s, durable_s = run()
            if number:
                results[name].blocked_s.append(blocked_s)
                results[name].durable_s.append(durable_s)
    return list(results.values())


def every_step(step: Callable[[], None], ours: Ours, pairs: int) -> list[dict[str, float]]:
    """Seconds of a step with a snapshot after every step, and without, pair by pair."""

    def seconds(with_snapshot: bool) -> float:
        _settle()
        began_at = time.perf_counter()
        if with_snapshot:
            ours.take()
        step()
        _settle()
        return time.perf_counter() - began_at

    found = []
    for number in range(pairs):
        first = bool(number % 2)
        times = {first: seconds(first), not first: seconds(not first)}
        found.append({"with_s": times[True], "without_s": times[False]})
    return found


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run everything; what was measured, in seconds."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(_alone())
        folder = functools.partial(tempfile.TemporaryDirectory, prefix="resilience-bench-")
        arena = Path(stack.enter_context(folder(dir=arguments.arena)))
        disk = Path(stack.enter_context(folder(dir=arguments.disk)))
        engine, step = build(arguments.mib, arguments.batch)
        ours = Ours(engine, arena / "arena")
        stack.callback(ours.snapshots.close)
        (arena / "arena").mkdir(mode=0o700)
        for _ in range(ours.num_slots):
            step()
            ours.take()
        ours.prepare()
        copy = memory_copy(ours.num_bytes, arena, engine.device)
        # `between` trains on, for a slot is overwritten by a later step only.
        saved = in_turn({"memcpy": copy, **savers(ours, disk, step)}, arguments.rounds, step)
        shutil.rmtree(ours.folder)
        ours.prepare()
        restored = in_turn({"memcpy": copy, **restorers(ours, disk)}, arguments.rounds, lambda: None)
        steps = every_step(step, ours, arguments.pairs or arguments.rounds)
        processor = _device_name(engine.device) or platform.processor() or platform.machine()
        return {
            "machine": f"{processor}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}",
            "num_bytes": ours.num_bytes,
            "rounds": arguments.rounds,
            "save": [dataclasses.asdict(each) for each in saved],
            "restore": [dataclasses.asdict(each) for each in restored],
            "steps": steps,
        }


def _device_name(device: Any) -> str:
    import torch

    return str(torch.cuda.get_device_name(device)) if device.type == "cuda" else ""


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """A job of one rank in this process, which says nothing."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1"}
    os.environ.update({name: str(value) for name, value in (place | {"MASTER_PORT": port}).items()})
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    try:
        yield
    finally:
        import torch.distributed

        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _clock() -> Any:
    from resilience.clock import SystemClock

    return SystemClock()


def _fail(reason: str) -> None:
    raise SystemExit(f"scripts/bench: {reason}")


def show(result: dict[str, Any]) -> None:
    """Print what was measured."""
    from rich.console import Console
    from rich.table import Table

    console, num_bytes = Console(width=140), result["num_bytes"]
    console.print(f"{result['machine']}; {num_bytes / 2**20:.0f} MiB of state, {result['rounds']} rounds")
    for what in ("save", "restore"):
        rows = result[what]
        unit = statistics.median(rows[0]["blocked_s"])
        table = Table(title=what)
        for heading in ("", "blocks, s", "least", "most", "÷ memcpy", "GB/s", "done after, s"):
            table.add_column(heading)
        for row in rows:
            blocked_s = row["blocked_s"]
            median = statistics.median(blocked_s)
            spread = [f"{value:.3f}" for value in (median, min(blocked_s), max(blocked_s))]
            rate = f"{num_bytes / median / 1e9:.2f}"
            table.add_row(
                row["name"], *spread, f"{median / unit:.2f}", rate, f"{statistics.median(row['durable_s']):.3f}"
            )
        console.print(table)
    steps = result["steps"]
    ratios = sorted(pair["with_s"] / pair["without_s"] for pair in steps)
    quarter = len(ratios) // 4
    console.print(
        f"step with a snapshot after every step ÷ without: {statistics.median(ratios):.3f} of {len(ratios)} pairs,"
        f" half of them {ratios[quarter]:.3f} to {ratios[-1 - quarter]:.3f}, all {ratios[0]:.3f} to {ratios[-1]:.3f};"
        f" a step takes {statistics.median(pair['without_s'] for pair in steps):.2f} s"
    )
    if importlib.util.find_spec("torchsnapshot") is None:
        console.print("TorchSnapshot is not installed; --site FOLDER adds one where it is.")
    console.print("Medians. Only the memory snapshot verifies: every file before it is loaded, the engine afterwards.")


def main(words: list[str]) -> int:
    """Run the benchmark with these command-line words; returns the exit code."""
    parser = argparse.ArgumentParser(prog="scripts/bench snapshot", description=__doc__)
    parser.add_argument(
        "--mib", type=int, default=128, help="of state, about (default: 128; the arena takes four times)"
    )
    parser.add_argument("--batch", type=int, default=64, help="samples of a training step (default: 64)")
    parser.add_argument("--pairs", type=int, help="steps with and without a snapshot (default: as many as rounds)")
    parser.add_argument("--rounds", type=int, default=7, help="counted repetitions of everything (default: 7)")
    parser.add_argument("--arena", type=Path, default=Path("/dev/shm"), help="folder on tmpfs (default: /dev/shm)")
    parser.add_argument("--disk", type=Path, default=Path(tempfile.gettempdir()), help="folder on a disk")
    parser.add_argument("--site", type=Path, help="further folder with packages, for TorchSnapshot")
    parser.add_argument("--json", type=result_file, help="write the results here, too")
    arguments = parser.parse_args(words)
    if min(arguments.mib, arguments.batch, arguments.rounds, arguments.pairs or 1) < 1:
        parser.error("--mib, --batch, --rounds and --pairs must be at least 1")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # unwinds, and so empties the arena
    if arguments.site is not None:
        sys.path.append(str(arguments.site))
    result = measure(arguments)
    show(result)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0
