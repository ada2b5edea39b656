"""One rank of a small DeepSpeed job with verified checkpoints, for test_checkpoints.py. Never imported.

Started with RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT and a JSON object of settings as its only argument, in which
`<rank>` stands for the rank.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import signal
import sys
from pathlib import Path
from typing import Any

import deepspeed
import numpy
import torch
from ending import leave

from resilience.checkpoint.doubt import SavedCheckpoints
from resilience.clock import SystemClock
from resilience.config import CheckpointConfig, Config
from resilience.context import RunContext
from resilience.deepspeed import checkpoint
from resilience.errors import ResilienceError


@dataclasses.dataclass
class GuardState:
    generation: int
    last_verified_step: int = 0
    loaded_step: int | None = None
    saved: SavedCheckpoints = dataclasses.field(default_factory=lambda: SavedCheckpoints(lambda _, text: print(text)))


class Clock(SystemClock):
    """Stands for a process that began earlier than it did."""

    def __init__(self, behind_s: float) -> None:
        self._behind_s = behind_s

    def wall(self) -> float:
        return super().wall() - self._behind_s


class Recorder:
    def __init__(self) -> None:
        self.facts: list[dict[str, Any]] = []
        self.notes: list[str] = []

    def report(self, fact: Any) -> None:
        self.facts.append(dataclasses.asdict(fact))

    def note(self, kind: str, message: str, *, step: int = 0) -> None:
        self.notes.append(f"{kind} at {step}: {message}")


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(16, 32)
        self.dropout = torch.nn.Dropout(0.2)
        self.second = torch.nn.Linear(32, 16)
        self.second_bias = torch.nn.Parameter(torch.zeros(16))
        self.register_buffer("num_calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.num_calls += 1
        hidden = self.dropout(torch.relu(self.first(x)))
        return ((self.second(hidden) + self.second_bias - x) ** 2).float().mean()


def two_stages() -> torch.nn.Module:
    layers = [torch.nn.Linear(16, 16), torch.nn.Linear(16, 16)]
    return deepspeed.pipe.PipelineModule(layers=layers, num_stages=2, loss_fn=torch.nn.functional.mse_loss)


def deepspeed_config(settings: dict[str, Any]) -> dict[str, Any]:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 4}},
        "zero_optimization": {"stage": settings["stage"]},
    }
    if settings["dtype"] == "bf16":
        config["bf16"] = {"enabled": True}
    if settings.get("node_local"):
        config["checkpoint"] = {"use_node_local_storage": True}
    return config


def digest(engine: Any) -> str:
    """Of what this rank holds: parameters, masters, moments, random states, counters."""
    state = hashlib.sha256()
    tensors = [*engine.module.state_dict().values(), torch.get_rng_state()]
    for name in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat", "fp32_groups_flat_partition"):
        tensors += list(getattr(engine.optimizer, name, []))
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    for values in inner.state.values():
        tensors += [value for _, value in sorted(values.items()) if isinstance(value, torch.Tensor)]
    for tensor in tensors:
        state.update(tensor.detach().float().contiguous().numpy().tobytes())
    extra = (random.getstate(), numpy.random.get_state()[1].tobytes(), engine.micro_steps, engine.get_lr())
    state.update(repr(extra).encode())
    return state.hexdigest()


def train(engine: Any, settings: dict[str, Any]) -> list[float]:
    losses = []
    dtype = torch.bfloat16 if settings["dtype"] == "bf16" else torch.float32
    rank = torch.distributed.get_rank()
    while engine.global_steps < settings["steps"]:
        for micro_step in range(2):
            seed = engine.global_steps * 100 + micro_step * 10 + rank
            batch = torch.randn(4, 16, generator=torch.Generator().manual_seed(seed)).to(dtype)
            batch = batch + random.random() + float(numpy.random.rand())
            loss = engine(batch.to(dtype))
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        if engine.global_steps in settings.get("saves", []):
            save(engine, settings)
    return losses


def save(engine: Any, settings: dict[str, Any]) -> None:
    rank = torch.distributed.get_rank()
    original = engine.checkpoint_engine.save

    def sabotaged(state_dict: Any, path: str) -> None:
        if settings.get("kill_at") == engine.global_steps and rank == settings["victim"]:
            Path(path).write_bytes(b"PK torn")
            os.kill(os.getpid(), signal.SIGKILL)
        if settings.get("full_at") == engine.global_steps and rank == settings["victim"]:
            raise OSError(28, "No space left on device")
        original(state_dict, path)

    engine.checkpoint_engine.save = sabotaged
    try:
        engine.save_checkpoint(settings["save_dir"], **settings.get("save_options", {}))
    finally:
        del engine.checkpoint_engine.save


def load(engine: Any, wanted: dict[str, Any], recorder: Recorder) -> dict[str, Any]:
    """What one load_checkpoint did."""
    num_facts, generators = len(recorder.facts), random_states()
    try:
        path, _ = engine.load_checkpoint(wanted["dir"], wanted.get("tag"), **wanted.get("options", {}))
        outcome: dict[str, Any] = {"path": path, "step": engine.global_steps}
    except ResilienceError as error:
        outcome = {"error": f"{type(error).__name__}: {error}"}
    return {**outcome, "facts": recorder.facts[num_facts:], "random_kept": random_states() == generators}


def random_states() -> tuple[Any, ...]:
    """Of all global generators."""
    return random.getstate(), numpy.random.get_state()[1].tobytes(), torch.get_rng_state().tolist()


def main() -> None:
    settings = json.loads(sys.argv[1].replace("<rank>", os.environ["RANK"]))
    torch.manual_seed(1)
    random.seed(int(os.environ["RANK"]))
    numpy.random.seed(int(os.environ["RANK"]))
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    model = two_stages() if settings.get("pipeline") else Model()
    engine, *_ = deepspeed.initialize(model=model, config=deepspeed_config(settings))
    context = RunContext(
        run_id=settings.get("run_id", "run"),
        run_dir=Path(settings["save_dir"]),
        coordinator_address="",
        config=Config(
            mode=settings.get("mode", "enforce"), checkpoint=CheckpointConfig(verify=settings.get("verify", True))
        ),
    )
    recorder, guard_state = Recorder(), GuardState(settings.get("generation", 1))
    clock = Clock(settings.get("clock_is_behind_s", 0))
    checkpoint.install(engine, context=context, client=recorder, guard_state=guard_state, clock=clock)
    if "stock_save" in settings:
        type(engine).save_checkpoint(engine, settings["stock_save"])
    result: dict[str, Any] = {"loads": [load(engine, wanted, recorder) for wanted in settings.get("loads", [])]}
    result["loaded_step"] = guard_state.loaded_step
    try:
        result["losses"] = train(engine, settings)
        result["digest"] = digest(engine)
    except ResilienceError as error:
        result["error"] = f"{type(error).__name__}: {error}"
    result["facts"] = list(recorder.facts)
    result["late_loads"] = [load(engine, wanted, recorder) for wanted in settings.get("late_loads", [])]
    Path(settings["result"]).write_text(json.dumps(result))
    torch.distributed.destroy_process_group()
    leave()


if __name__ == "__main__":
    main()
