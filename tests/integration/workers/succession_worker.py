"""Trains, keeps a snapshot by DeepSpeed's own means, and begins anew as a restarted script does. One rank of two.

The prepared folder is made here, so that what is tested is the guard's part alone: trail and fast-forward.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
import xxhash
from ending import leave
from matrix_cases import CASES, Case
from matrix_worker import build_engine, state_of, train_step
from scenario_worker import Coordinator

from resilience.checkpoint import randomness
from resilience.checkpoint.exchange import gather
from resilience.config import Config
from resilience.context import ARENA_VARIABLE, RESTORE_VARIABLE, RunContext
from resilience.deepspeed import hook, snapshot_take
from resilience.events import SnapshotFact
from resilience.snapshot.arena import Arena
from resilience.snapshot.manifest import Commit, Manifest, Part, serialise_manifest

NUM_STEPS, SNAPSHOT_STEP, CHECKPOINT_STEP = 6, 4, 2
StepOf = Callable[[Case, Any, int], list[torch.Tensor]]
LED = (
    "zero0-fp32-accumulation1",
    "zero1-bf16-accumulation2",
    "zero2-bf16-accumulation2",
    "zero3-bf16-accumulation2",
    "gpt2-eager-stored",
    "direct-zero2",
)


@dataclasses.dataclass
class Life:
    """One process's life, from the script's first line to its end."""

    state: Any = None
    losses: list[float] = dataclasses.field(default_factory=list)
    exit_code: int | None = None
    steps: int = 0
    facts: list[SnapshotFact] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    left: Any = None

    def report(self) -> dict[str, Any]:
        return {
            "exit_code": self.exit_code,
            "steps": self.steps,
            "facts": [f"{fact.kind}:{fact.step}" for fact in self.facts],
            "reasons": sorted({fact.reason for fact in self.facts if fact.reason}),
            "notes": self.notes,
            "left": self.left,
        }


class Listening(Coordinator):
    def __init__(self, config: Config, life: Life) -> None:
        self._life = life
        super().__init__(config)

    def _hear(self, fact: Any) -> None:
        super()._hear(fact)
        if isinstance(fact, SnapshotFact):
            self._life.facts.append(fact)


def live(
    case: Case,
    folder: Path,
    *,
    restores: bool,
    step_of: StepOf = train_step,
    own_checkpoint: bool = False,
    settings: dict[str, Any] | None = None,
) -> Life:
    """Train from the first line on; keep a snapshot, or restore it."""
    life = Life()
    os.environ[ARENA_VARIABLE] = str(folder)
    os.environ.pop(RESTORE_VARIABLE, None)
    if restores:
        os.environ[RESTORE_VARIABLE] = str(folder / "restore-g2")
    engine = build_engine(case)
    config = Config.model_validate({"detection": {"strength": "off"}, **(settings or {})})
    context = RunContext(run_id="run", run_dir=folder, coordinator_address="127.0.0.1:1", config=config)
    coordinator = Listening(config, life)
    hook.protect(engine, context, reporter=coordinator)
    if not restores:
        keep_snapshot_in_step(engine, folder)
    try:
        if own_checkpoint and restores:
            engine.load_checkpoint(str(folder / "own"))
        while engine.global_steps < NUM_STEPS:
            life.losses += [float(loss) for loss in step_of(case, engine, engine.global_steps + 1)]
            if own_checkpoint and engine.global_steps == CHECKPOINT_STEP:
                engine.save_checkpoint(str(folder / "own"))
    except SystemExit as ending:
        life.exit_code = int(ending.code or 0)
    hook.release(engine)
    life.state, life.steps = state_of(engine), engine.global_steps
    life.notes, life.left = coordinator.notes, coordinator.left
    engine.destroy()
    return life


def keep_snapshot_in_step(engine: Any, folder: Path) -> None:
    """Keep one at the end of `engine.step()`, before the script does anything else."""
    step, kept = engine.step, []

    def step_and_keep(*args: Any, **kwargs: Any) -> None:
        step(*args, **kwargs)
        if engine.global_steps == SNAPSHOT_STEP and not kept:
            kept.append(True)
            keep_snapshot(engine, folder)

    engine.__dict__["step"] = step_and_keep


def keep_snapshot(engine: Any, folder: Path) -> None:
    """What writer and guardian make of a snapshot, with DeepSpeed's own save."""
    restore = folder / "restore-g2"
    type(engine).save_checkpoint(engine, str(restore), tag=f"global_step{SNAPSHOT_STEP}", save_latest=False)
    rank, arena = dist.get_rank(), Arena(folder)
    trail = arena.trail(rank).read_bytes()
    (restore / f"trail-{rank}.bin").write_bytes(trail)
    commit = Commit(
        run_id="run",
        generation=1,
        step=SNAPSHOT_STEP,
        rank=rank,
        world_size=2,
        slot=0,
        sequence=1,
        at=1.0,
        clean_through=0,
        blocked_s=0.0,
        random=randomness.capture({}),
        counters=snapshot_take.counters(engine),
        trail_bytes=len(trail),
        files=(),
    )
    mine = [dataclasses.asdict(commit), xxhash.xxh3_128_hexdigest(trail)]
    parts = [Part(commit=Commit(**{**row, "files": ()}), trail=digest) for row, digest in gather(mine, engine.device)]
    if rank == 0:
        manifest = Manifest(
            run_id="run", generation=1, step=SNAPSHOT_STEP, world_size=2, node="n", at=1.0, clean_through=0,
            parts=tuple(parts),
        )  # fmt: skip
        (restore / "snapshot.json").write_bytes(serialise_manifest(manifest))
        arena.manifests.mkdir(exist_ok=True)
        for step in (3, SNAPSHOT_STEP):
            arena.manifest(step, 1).touch()
    dist.barrier()


# ------ scripts


def with_evaluation(case: Case, engine: Any, step: int) -> list[torch.Tensor]:
    """Evaluates between steps, through the engine and past it, and draws numbers of its own."""
    losses = train_step(case, engine, step)
    engine.eval()
    with torch.no_grad():
        tokens = torch.arange(64).reshape(4, 16) % (step + 7)
        for model in (engine, engine.module):
            losses.append(model(tokens, tokens, torch.tensor(1.0)))
    engine.train()
    return [*losses, torch.rand(())]


def other_data_at_3(case: Case, engine: Any, step: int) -> list[torch.Tensor]:
    """Its data come in another order after a restart: it is the second life's."""
    is_second = RESTORE_VARIABLE in os.environ and step == 3
    return train_step(case, engine, 99 if is_second else step)


def reading_weights(case: Case, engine: Any, step: int) -> list[torch.Tensor]:
    losses = train_step(case, engine, step)
    if step == CHECKPOINT_STEP:
        engine.module.state_dict()
    return losses


def reading_parameters(case: Case, engine: Any, step: int) -> list[torch.Tensor]:
    """A penalty computed past the engine."""
    tokens = torch.arange(64).reshape(4, 16)
    loss = engine(tokens, tokens, torch.tensor(1.0)) + 0.01 * engine.module.norm.weight.float().square().sum()
    loss.backward()
    engine.step()
    return [loss]


# ------ scenarios


def led(name: str) -> dict[str, Any]:
    case = next(case for case in CASES if case.name == name)
    return compare(case, train_step)


def compare(case: Case, step_of: StepOf, **options: Any) -> dict[str, Any]:
    folder = shared(f"{case.name}-{step_of.__name__}")
    first = live(case, folder, restores=False, step_of=step_of, **options)
    second = live(case, folder, restores=True, step_of=step_of, **options)
    num_same = sum(a == b for a, b in zip(reversed(first.losses), reversed(second.losses), strict=False))
    return {
        "equal": first.state == second.state,
        "losses_equal": num_same == len(second.losses) > 0,
        "num_losses": [len(first.losses), len(second.losses)],
        **second.report(),
    }


ZERO2 = Case(name="zero2")
ZERO1 = Case(name="zero1", zero=1, accumulation=1, precision="fp32")


def damaged_trail() -> dict[str, Any]:
    folder = shared("damaged")
    live(ZERO2, folder, restores=False)
    path = folder / "restore-g2" / f"trail-{dist.get_rank()}.bin"
    if dist.get_rank() == 1:
        content = bytearray(path.read_bytes())
        content[100] ^= 1
        path.write_bytes(content)
    dist.barrier()
    return live(ZERO2, folder, restores=True).report()


def shared(name: str) -> Path:
    """A folder for both ranks."""
    folder: Path = ARGUMENTS.output.parent / name
    if dist.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "restore-g2").mkdir(parents=True)
    dist.barrier()
    return folder


SCENARIOS: dict[str, Callable[[], dict[str, Any]]] = {
    **{name: (lambda name=name: led(name)) for name in LED},
    "convolution": lambda: compare(next(case for case in CASES if case.model == "convolution"), train_step),
    "evaluation": lambda: compare(ZERO2, with_evaluation),
    "own_checkpoint": lambda: compare(ZERO2, train_step, own_checkpoint=True),
    "other_data": lambda: compare(ZERO2, other_data_at_3),
    "reading_weights": lambda: compare(ZERO2, reading_weights),
    "reading_parameters": lambda: compare(ZERO1, reading_parameters),
    "budget": lambda: compare(ZERO2, train_step, settings={"snapshot": {"trail_max_mib": 0.02}}),
    "damaged_trail": damaged_trail,
}


def main() -> None:
    deepspeed.init_distributed("gloo")
    for name, scenario in SCENARIOS.items():
        if ARGUMENTS.only and name not in ARGUMENTS.only:
            continue
        result = scenario()
        for line in gather({"scenario": name, **result}, torch.device("cpu")):
            if dist.get_rank() == 0:
                with ARGUMENTS.output.open("a", encoding="utf-8") as output:
                    output.write(json.dumps(line) + "\n")
    leave()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--only", nargs="*")
    ARGUMENTS = parser.parse_args()
    main()
