"""Measures on the demo's model what protection costs: one rank of `scripts/bench overhead`.

Blocks of plain and of protected steps alternate on the same engine in the same processes, in the order A B B A, so that
what else the machine does and how far training is meet both alike. The first step of a block is not timed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import deepspeed
import torch
from train_gpt import GPT, SEED, read_batch, read_text

from resilience.config import Config, DetectionConfig, GuardConfig
from resilience.deepspeed import hook


class Trainer:
    """The demo's training loop, a block of steps at a time."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.rank = deepspeed.comm.get_rank()
        self.text = read_text()

    def step(self) -> None:
        step = self.engine.global_steps + 1
        for micro_step in range(self.engine.gradient_accumulation_steps()):
            size = self.engine.train_micro_batch_size_per_gpu()
            batch = read_batch(self.text, size, step=step, micro_step=micro_step, rank=self.rank)
            batch = batch.to(self.engine.device)
            self.engine.backward(self.engine(batch[:, :-1], batch[:, 1:]))
            self.engine.step()

    def seconds_per_step(self, num_steps: int) -> float:
        self.step()
        self._wait()
        started_at = time.perf_counter()
        for _ in range(num_steps):
            self.step()
        self._wait()
        return (time.perf_counter() - started_at) / num_steps

    def _wait(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        deepspeed.comm.barrier()


def measure(trainer: Trainer, strength: str, *, num_pairs: int, num_steps: int) -> dict[str, Any]:
    """Ratios of protected to plain seconds per step, one for each pair of neighbouring blocks."""
    config = Config(
        detection=DetectionConfig.model_validate({"strength": strength}),
        guard=GuardConfig(measure_determinism=False),  # done once in a run, at its start
    )

    def plain() -> float:
        return trainer.seconds_per_step(num_steps)

    def protected() -> float:
        hook.protect(trainer.engine, config)
        try:
            return trainer.seconds_per_step(num_steps)
        finally:
            hook.release(trainer.engine)

    plain_seconds, ratios = [], []
    for pair in range(num_pairs):
        if pair % 2 == 0:
            without, with_protection = plain(), protected()
        else:
            with_protection, without = protected(), plain()
        plain_seconds.append(without)
        ratios.append(with_protection / without)
    return {
        "strength": strength,
        "share": config.detection.share,
        "ratios": ratios,
        "median_ratio": statistics.median(ratios),
        "plain_step_ms": 1000 * statistics.median(plain_seconds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the launcher")
    parser.add_argument("--strengths", required=True)
    parser.add_argument("--pairs", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--result", type=Path, required=True)
    arguments = deepspeed.add_config_arguments(parser).parse_args()
    torch.manual_seed(SEED)
    model = GPT()
    engine, *_ = deepspeed.initialize(args=arguments, model=model, model_parameters=model.parameters())
    trainer = Trainer(engine)
    rows = [
        measure(trainer, strength, num_pairs=arguments.pairs, num_steps=arguments.steps)
        for strength in arguments.strengths.split(",")
    ]
    if trainer.rank == 0:
        result = {
            "model": f"GPT of {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, ZeRO-2, bf16",
            "world_size": deepspeed.comm.get_world_size(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores",
            "num_steps_in_block": arguments.steps,
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "deepspeed": deepspeed.__version__,
            },
            "strengths": rows,
        }
        arguments.result.write_text(json.dumps(result, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
    deepspeed.comm.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may abort an interpreter that shuts down (torch 2.13)
