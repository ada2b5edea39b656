"""Measures on one model what protection costs: one rank of `scripts/bench overhead`.

Blocks of plain and of protected steps alternate on the same engine in the same processes, in the order A B B A, so that
what else the machine does and how far training is meet both alike. The first step of a block is not timed.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import json
import os
import platform
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import deepspeed
import torch
from overhead_models import ATTENTIONS, MODELS, Trained, build
from own_time import OwnTime

from resilience.abft.adaptive import Solution
from resilience.abft.frequency import MEASURED_STEPS
from resilience.config import Config, GuardConfig
from resilience.deepspeed import hook

SEED = 2025


class Timed(NamedTuple):
    """One optimizer step, or the time until one."""

    seconds: float
    own_seconds: float
    """Spent in protection's own code."""
    user_seconds: float
    """Of all threads, in the program itself."""
    system_seconds: float
    """Of all threads, in the kernel: mostly for pages of memory."""
    page_faults: float

    @property
    def own_ratio(self) -> float:
        """Protection's own code ÷ all else."""
        return self.own_seconds / (self.seconds - self.own_seconds)


class Trainer:
    """A training loop, a block of steps at a time."""

    def __init__(self, engine: Any, trained: Trained, own: OwnTime) -> None:
        self.engine = engine
        self._loss = trained.loss
        self._own = own

    def step(self) -> None:
        step = self.engine.global_steps + 1
        for micro_step in range(self.engine.gradient_accumulation_steps()):
            self.engine.backward(self._loss(self.engine, step, micro_step))
            self.engine.step()

    def timed(self, num_steps: int, *, num_untimed: int = 1) -> list[Timed]:
        """Each step of a block."""
        gc.collect()  # what protecting and releasing an engine leaves behind is no cost of a step
        for _ in range(num_untimed):
            self.step()
        self._wait()
        ends = [self._so_far()]
        for _ in range(num_steps):
            self.step()
            self._wait()
            ends.append(self._so_far())
        return [
            Timed(*(after - before for before, after in zip(*both, strict=True))) for both in itertools.pairwise(ends)
        ]

    def _so_far(self) -> Timed:
        used = resource.getrusage(resource.RUSAGE_SELF)
        return Timed(time.perf_counter(), self._own.seconds, used.ru_utime, used.ru_stime, used.ru_minflt)

    def _wait(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        deepspeed.comm.barrier()


def measure(trainer: Trainer, detection: dict[str, Any], *, num_pairs: int, num_steps: int) -> dict[str, Any]:
    """Ratios of protected to plain seconds per step: one for each pair of neighbouring blocks, and of the lower
    quartiles of all steps, which is what they take where nothing else is in their way. Beside them what protection's
    own code takes of a protected step.
    """
    config = Config.model_validate(
        # Determinism is measured once in a run, at its start.
        {"detection": detection, "guard": GuardConfig(measure_determinism=False)}
    )

    # An adaptive share is set once costs were measured.
    num_untimed = MEASURED_STEPS + 1 if config.detection.share == "adaptive" else 1
    solutions = []

    def plain() -> list[Timed]:
        return trainer.timed(num_steps)

    def protected() -> list[Timed]:
        hook.protect(trainer.engine, config)
        try:
            steps = trainer.timed(num_steps, num_untimed=num_untimed)
            solutions.append(solution(trainer.engine))
            return steps
        finally:
            hook.release(trainer.engine)

    plain_steps: list[Timed] = []
    protected_steps: list[Timed] = []
    ratios = []
    for pair in range(num_pairs):
        if pair % 2 == 0:
            without, with_protection = plain(), protected()
        else:
            with_protection, without = protected(), plain()
        plain_steps += without
        protected_steps += with_protection
        ratios.append(sum(step.seconds for step in with_protection) / sum(step.seconds for step in without))
    own_ratios = [step.own_ratio for step in protected_steps]
    return {
        **detection,
        **_adaptive(solutions),
        "ratios": ratios,
        "median_ratio": statistics.median(ratios),
        "quartile_ratio": _lower_quartile(protected_steps) / _lower_quartile(plain_steps),
        "own_ratio": statistics.median(own_ratios),
        "own_ratio_range": [min(own_ratios), max(own_ratios)],
        "plain_step_ms": 1000 * statistics.median(step.seconds for step in plain_steps),
        "user_ratio": _median(protected_steps).user_seconds / _median(plain_steps).user_seconds,
        "plain_median": _median(plain_steps)._asdict(),
        "protected_median": _median(protected_steps)._asdict(),
    }


def _median(steps: list[Timed]) -> Timed:
    """Of each number by itself."""
    return Timed(*map(statistics.median, zip(*steps, strict=True)))


def _lower_quartile(steps: list[Timed]) -> float:
    seconds = [step.seconds for step in steps]
    return statistics.quantiles(seconds, n=4, method="inclusive")[0] if len(seconds) > 1 else seconds[0]


def solution(engine: Any) -> Solution | None:
    """The adaptive shares that `engine` runs with; None where all calls have one share."""
    guarded = hook.guarded(engine)
    return guarded.protection.frequency if guarded is not None and guarded.protection is not None else None


def _adaptive(solutions: list[Solution | None]) -> dict[str, Any]:
    """The least coverage, and the shares of every block."""
    found = [one for one in solutions if one is not None]
    if not found:
        return {}
    shares = [{site: round(share, 4) for site, share in one.shares.items()} for one in found]
    return {"coverage": min(one.coverage for one in found), "shares": shares}


def machine() -> str:
    """The hardware, in words."""
    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{os.cpu_count()} CPU cores ({processor()}, {capability}), {torch.get_num_threads()} threads a rank"


def processor() -> str:
    """As Linux names it; elsewhere, and where it has no name, what kind it is."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the launcher")
    parser.add_argument("--model", choices=MODELS, required=True)
    parser.add_argument("--attention", choices=ATTENTIONS, default="eager")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--detections", type=json.loads, required=True, help="a list of [detection] sections, as JSON")
    parser.add_argument("--pairs", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--result", type=Path, required=True)
    arguments = deepspeed.add_config_arguments(parser).parse_args()
    torch.manual_seed(SEED)
    own = OwnTime()
    own.watch()
    trained = build(
        arguments.model,
        attention=arguments.attention,
        num_layers=arguments.layers,
        batch_size=arguments.batch,
        checkpointing=arguments.checkpointing,
    )
    model = trained.model
    engine, *_ = deepspeed.initialize(args=arguments, model=model, model_parameters=model.parameters())
    trainer = Trainer(engine, trained, own)
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
