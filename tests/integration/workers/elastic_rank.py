"""One rank of a job that trains the same model under several configurations, for test_elastic.py. Never imported.

Started with RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT and a JSON object of settings as its only argument. The samples
of an optimizer step follow from its number alone, whatever the number of ranks.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
from ending import leave

from resilience.checkpoint.doubt import SavedCheckpoints
from resilience.config import CheckpointConfig, Config
from resilience.context import RunContext
from resilience.deepspeed import checkpoint, universal_load
from resilience.deepspeed.snapshot_take import Taker
from resilience.errors import ResilienceError

GLOBAL_BATCH, MICRO_BATCH = 8, 2


@dataclasses.dataclass
class GuardState:
    generation: int = 1
    last_verified_step: int = 0
    loaded_step: int | None = None
    saved: SavedCheckpoints = dataclasses.field(default_factory=lambda: SavedCheckpoints(lambda _, text: print(text)))


class Recorder:
    def __init__(self) -> None:
        self.notes: list[str] = []

    def report(self, fact: Any) -> None:
        pass

    def note(self, kind: str, message: str, *, step: int = 0) -> None:
        self.notes.append(f"{kind} at {step}: {message}")


class Model(torch.nn.Module):
    """Sizes that no number of ranks divides, a buffer of each kind, a frozen parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(7, 13)
        self.norm = torch.nn.LayerNorm(13)
        self.second = torch.nn.Linear(13, 7)
        self.frozen = torch.nn.Parameter(torch.randn(5, 3), requires_grad=False)
        self.register_buffer("num_calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.num_calls += 1
        self.mean.copy_(0.9 * self.mean + 0.1 * x.float().mean())
        hidden = self.norm(torch.tanh(self.first(x)))
        return ((self.second(hidden) - x) ** 2).float().mean() + 0 * self.frozen.sum().float()


def build(case: dict[str, Any], settings: dict[str, Any]) -> tuple[Any, Recorder]:
    # Another seed where something is to be loaded: what is not loaded must differ.
    torch.manual_seed(settings["seed"])
    model = Model()
    decayed = [p for name, p in model.named_parameters() if p.requires_grad and "weight" in name]
    others = [p for name, p in model.named_parameters() if p.requires_grad and "weight" not in name]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": MICRO_BATCH,
        "gradient_accumulation_steps": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 4}},
        "zero_optimization": {"stage": case["stage"]},
    }
    if case["dtype"] == "bf16":
        config["bf16"] = {"enabled": True}
    engine, *_ = deepspeed.initialize(model=model, model_parameters=groups, config=config)
    context = RunContext(
        run_id=settings["run_id"],
        run_dir=Path(settings["root"]),
        coordinator_address="",
        config=Config(checkpoint=CheckpointConfig(verify=True)),
    )
    recorder = Recorder()
    checkpoint.install(engine, context=context, client=recorder, guard_state=GuardState())
    return engine, recorder


def train(engine: Any, until: int, dtype: torch.dtype) -> list[float]:
    rank, world_size, losses = torch.distributed.get_rank(), torch.distributed.get_world_size(), []
    while engine.global_steps < until:
        samples = torch.randn(GLOBAL_BATCH, 7, generator=torch.Generator().manual_seed(engine.global_steps))
        for micro_step in range(engine.gradient_accumulation_steps()):
            start = (micro_step * world_size + rank) * MICRO_BATCH
            loss = engine(samples[start : start + MICRO_BATCH].to(dtype))
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
    return losses


def attempt(engine: Any, load_dir: str) -> str:
    try:
        engine.load_checkpoint(load_dir)
    except ResilienceError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def attempt_with_a_lie(case: dict[str, Any], settings: dict[str, Any], load_dir: str) -> str:
    """Load where one element of a moment comes out different by its lowest bit, then damage what was converted."""
    engine, _ = build(case, settings)
    complete = universal_load.complete

    def complete_and_lie(engine: Any, *args: Any, **kwargs: Any) -> None:
        complete(engine, *args, **kwargs)
        state = next(iter(engine.optimizer.optimizer.state.values()))
        state["exp_avg_sq"].view(torch.int32).view(-1)[0] ^= 1

    universal_load.complete = complete_and_lie
    try:
        error = attempt(engine, load_dir)
    finally:
        universal_load.complete = complete
    if torch.distributed.get_rank() == 0:
        (victim,) = Path(load_dir).glob("*-universal/zero/second.weight/exp_avg.pt")
        content = bytearray(victim.read_bytes())
        content[len(content) // 2] ^= 4
        victim.write_bytes(content)
    torch.distributed.barrier()
    engine.destroy()
    return error


def run(case: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    place = f"{settings['root']}/{case['name']}"
    result: dict[str, Any] = {}
    load_dir = settings.get("load") and f"{place}/{settings['load']}"
    if load_dir and settings.get("lie"):
        result["lie"] = attempt_with_a_lie(case, settings, load_dir)
    engine, recorder = build(case, settings)
    if load_dir:
        result["error"] = attempt(engine, load_dir)
        result["universal_left_on"] = bool(engine.load_universal_checkpoint())
        result["decays"] = [group["weight_decay"] for group in engine.optimizer.optimizer.param_groups]
        result["num_calls"] = int(engine.module.num_calls)
        engine.save_checkpoint(f"{place}/{settings['again']}")
    result["random"] = torch.get_rng_state().tolist()
    result["loaded_step"] = engine.global_steps
    result["batch"] = [engine.train_batch_size(), engine.gradient_accumulation_steps()]
    dtype = torch.bfloat16 if case["dtype"] == "bf16" else torch.float32
    result["losses"] = []
    for until, name in settings["saves"]:
        result["losses"] += train(engine, until, dtype)
        engine.save_checkpoint(f"{place}/{name}")
    if settings.get("snapshot"):
        # All ranks into one folder, as a guardian puts together what it prepares.
        taker = Taker(engine)
        taker.fill(Path(place) / settings["snapshot"], taker.collect())
        taker.close()
    result["notes"] = recorder.notes
    engine.destroy()
    return result


def main() -> None:
    settings = json.loads(sys.argv[1].replace("<rank>", os.environ["RANK"]))
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    results = {case["name"]: run(case, settings) for case in settings["cases"]}
    Path(settings["result"]).write_text(json.dumps(results))
    torch.distributed.destroy_process_group()
    leave()


if __name__ == "__main__":
    main()
