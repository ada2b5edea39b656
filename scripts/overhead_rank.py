"""Measures on one model what protection costs: one rank of `scripts/bench overhead`.

Blocks of plain and of protected steps alternate on the same engine in the same processes, in the order A B B A, so that
what else the machine does and how far training is meet both alike. The first step of a block is not timed.
"""

from __future__ import annotations

import argparse
import itertools
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
from overhead_models import MODELS, Trained, build

from resilience.abft.frequency import MEASURED_STEPS
from resilience.config import Config, GuardConfig
from resilience.deepspeed import hook

SEED = 2025


class Trainer:
    """A training loop, a block of steps at a time."""

    def __init__(self, engine: Any, trained: Trained) -> None:
        self.engine = engine
        self._loss = trained.loss

    def step(self) -> None:
        step = self.engine.global_steps + 1
        for micro_step in range(self.engine.gradient_accumulation_steps()):
            self.engine.backward(self._loss(self.engine, step, micro_step))
            self.engine.step()

    def seconds(self, num_steps: int, *, num_untimed: int = 1) -> list[float]:
        """Of each step."""
        for _ in range(num_untimed):
            self.step()
        self._wait()
        ends = [time.perf_counter()]
        for _ in range(num_steps):
            self.step()
            self._wait()
            ends.append(time.perf_counter())
        return [end - begin for begin, end in itertools.pairwise(ends)]

    def _wait(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        deepspeed.comm.barrier()


def measure(trainer: Trainer, detection: dict[str, Any], *, num_pairs: int, num_steps: int) -> dict[str, Any]:
    """Ratios of protected to plain seconds per step: one for each pair of neighbouring blocks, and of the lower
    quartiles of all steps, which is what they take where nothing else is in their way.
    """
    config = Config.model_validate(
        # Determinism is measured once in a run, at its start.
        {"detection": detection, "guard": GuardConfig(measure_determinism=False)}
    )

    # An adaptive share is set once costs were measured.
    num_untimed = MEASURED_STEPS + 1 if config.detection.share == "adaptive" else 1
    coverages = []

    def plain() -> list[float]:
        return trainer.seconds(num_steps)

    def protected() -> list[float]:
        hook.protect(trainer.engine, config)
        try:
            seconds = trainer.seconds(num_steps, num_untimed=num_untimed)
            coverages.append(coverage(trainer.engine))
            return seconds
        finally:
            hook.release(trainer.engine)

    plain_seconds: list[float] = []
    protected_seconds: list[float] = []
    ratios = []
    for pair in range(num_pairs):
        if pair % 2 == 0:
            without, with_protection = plain(), protected()
        else:
            with_protection, without = protected(), plain()
        plain_seconds += without
        protected_seconds += with_protection
        ratios.append(sum(with_protection) / sum(without))
    return {
        **detection,
        **({"coverage": min(coverages)} if num_untimed > 1 else {}),
        "ratios": ratios,
        "median_ratio": statistics.median(ratios),
        "quartile_ratio": _lower_quartile(protected_seconds) / _lower_quartile(plain_seconds),
        "plain_step_ms": 1000 * statistics.median(plain_seconds),
    }


def _lower_quartile(seconds: list[float]) -> float:
    return statistics.quantiles(seconds, n=4, method="inclusive")[0] if len(seconds) > 1 else seconds[0]


def coverage(engine: Any) -> float:
    """Of the adaptive share that `engine` runs with; 1 where everything is checked."""
    guarded = hook.guarded(engine)
    frequency = guarded.protection.frequency if guarded is not None and guarded.protection is not None else None
    return 1.0 if frequency is None else frequency.coverage


def machine() -> str:
    """The hardware, in words."""
    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{os.cpu_count()} CPU cores ({capability}), {torch.get_num_threads()} threads a rank"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the launcher")
    parser.add_argument("--model", choices=MODELS, required=True)
    parser.add_argument("--attention", choices=["eager", "sdpa"], default="eager")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--detections", type=json.loads, required=True, help="a list of [detection] sections, as JSON")
    parser.add_argument("--pairs", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--result", type=Path, required=True)
    arguments = deepspeed.add_config_arguments(parser).parse_args()
    torch.manual_seed(SEED)
    trained = build(
        arguments.model,
        attention=arguments.attention,
        num_layers=arguments.layers,
        batch_size=arguments.batch,
        checkpointing=arguments.checkpointing,
    )
    model = trained.model
    engine, *_ = deepspeed.initialize(args=arguments, model=model, model_parameters=model.parameters())
    trainer = Trainer(engine, trained)
    for _ in range(3):
        trainer.step()  # an engine's first steps pay for its memory
    rows = [
        measure(trainer, detection, num_pairs=arguments.pairs, num_steps=arguments.steps)
        for detection in arguments.detections
    ]
    if deepspeed.comm.get_rank() == 0:
        result = {
            "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
            "world_size": deepspeed.comm.get_world_size(),
            "machine": machine(),
            "num_steps_in_block": arguments.steps,
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "deepspeed": deepspeed.__version__,
            },
            "rows": rows,
        }
        arguments.result.write_text(json.dumps(result, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
    deepspeed.comm.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may abort an interpreter that shuts down (torch 2.13)
