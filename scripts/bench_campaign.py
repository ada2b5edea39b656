"""The fault-injection campaign: what the checks find, repair, miss and cry wolf about, on GPT-2 and Llama.

One fault a trial, in the result of one operation of a real training step, after its arithmetic and before its check.
docs/benchmarks/campaign.md explains the trials and the numbers.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import platform
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import transformers
from campaign.models import DTYPES, Setting, Subject, batches, build, optimizer_of, settings
from campaign.outcomes import Outcome, is_harmless, outcomes
from campaign.report import LARGE, cells, curve, outcome_summary, show
from campaign.trials import Schedule, Trial, Trials
from result_file import result_file, revision

from resilience.abft.protection import Protection
from resilience.config import DetectionConfig
from resilience.launch.processes import die_with_parent

EVERYWHERE = ("attention.q", "attention.out", "linear.out", "linear.dgrad", "linear.wgrad")
"""Sites that all four forms of a dtype have; every other site is in two of them."""


@dataclasses.dataclass(slots=True)
class Tally:
    """What all settings add up to."""

    trials: dict[str, list[Trial]] = dataclasses.field(default_factory=lambda: {name: [] for name in DTYPES})
    outcomes: dict[str, list[Outcome]] = dataclasses.field(default_factory=lambda: {name: [] for name in DTYPES})
    control: Counter[str] = dataclasses.field(default_factory=Counter)
    clean_checks: int = 0
    """Of training without faults. Those between trials, of one step again and again, say nothing new."""
    false_alarms: int = 0
    """Of training, and between trials."""

    def add(self, other: Tally) -> None:
        for dtype in DTYPES:
            self.trials[dtype] += other.trials[dtype]
            self.outcomes[dtype] += other.outcomes[dtype]
        self.control += other.control
        self.clean_checks += other.clean_checks
        self.false_alarms += other.false_alarms


def run_trials(setting: Setting, subject: Subject, num_trials: int, draw: random.Random, tally: Tally) -> list[Trial]:
    """Steps with trials until every site and kind had its share; each step must end in the bits of a clean one."""

    def share(site: str) -> int:
        return math.ceil(num_trials / (4 if site in EVERYWHERE else 2))

    clean = subject.result()
    schedule = Schedule(DTYPES[setting.dtype], share, draw)
    runner = Trials(subject.model, schedule, draw)
    while True:
        before = len(runner.trials)
        result = runner.run(subject.result)
        tally.control["steps"] += 1
        tally.control["equal"] += all(torch.equal(one, other) for one, other in zip(result, clean, strict=True))
        if len(runner.trials) == before:
            break
    tally.false_alarms += len(runner.false_alarms)
    if setting.dtype == "float32":
        for trial in runner.trials:
            if trial.damage.relative_change >= LARGE and not trial.detected:
                trial.harmless = is_harmless(subject, trial, clean)
    return runner.trials


def run_clean(subject: Subject, num_checks: int, tally: Tally) -> None:
    """Training under protection without faults, until `num_checks` checks were made."""
    protection = Protection(DetectionConfig())
    protection.install()
    protection.attach(subject.model)
    optimizer, data = optimizer_of(subject.model), batches()
    step = 0
    try:
        while sum(protection.checks().values()) < num_checks:
            step += 1
            protection.begin_micro_step(step, 0, 0)
            with protection.active():
                Subject(subject.model, next(data)).step()
            optimizer.step()
            tally.false_alarms += len(protection.drain())
    finally:
        protection.uninstall()
    tally.clean_checks += sum(protection.checks().values())


def run_setting(number: int, arguments: argparse.Namespace) -> Tally:
    """All that is done with one model in one form, in one thread; the same whichever process does it."""
    torch.set_num_threads(1)
    started = time.monotonic()
    setting, tally = settings()[number], Tally()
    draw = random.Random(f"{arguments.seed}:{number}")
    subject = build(setting)
    trials = run_trials(setting, subject, arguments.trials, draw, tally)
    tally.trials[setting.dtype] += trials
    changed = [trial for trial in trials if trial.damage.relative_change > 0]
    for seen in (True, False):
        members = [trial for trial in changed if trial.detected is seen]
        chosen = draw.sample(members, min(arguments.outcomes, len(members)))
        tally.outcomes[setting.dtype] += outcomes(subject, chosen, "seen" if seen else "not seen")
    missed = [trial for trial in trials if trial.harmless is False]
    tally.outcomes[setting.dtype] += outcomes(subject, missed, "missed")
    run_clean(subject, math.ceil(arguments.clean_checks / len(settings())), tally)
    words = f"{setting.model}, {setting.attention}, {setting.dtype}"
    print(f"{words}: {len(trials):,} trials, {time.monotonic() - started:.0f} s", file=sys.stderr)
    return tally


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    started, commit = time.monotonic(), revision()
    tally = Tally()
    for part in _tallies(arguments):
        tally.add(part)
    return {"revision": commit} | summary(tally, arguments, time.monotonic() - started)


def _tallies(arguments: argparse.Namespace) -> Iterator[Tally]:
    numbers = range(len(settings()))
    if arguments.jobs == 1:
        yield from (run_setting(number, arguments) for number in numbers)
        return
    # Where this process is ended, its workers must not go on for a quarter of an hour.
    ends_too = {"initializer": _end_with, "initargs": (os.getpid(),)}
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn"), **ends_too) as pool:
        yield from pool.map(run_setting, numbers, [arguments] * len(numbers))


def _end_with(parent_pid: int) -> None:
    if not die_with_parent(signal.SIGKILL, parent_pid=parent_pid):
        sys.exit("the campaign was ended")


def summary(tally: Tally, arguments: argparse.Namespace, seconds: float) -> dict[str, Any]:
    points = [
        {
            "dtype": dtype, "site": outcome.site, "kind": outcome.kind, "detected": outcome.detected,
            "group": outcome.group,
            **{name: _or_none(getattr(outcome, name)) for name in ("relative_change", "loss_change", "weight_change")},
        }
        for dtype, found in tally.outcomes.items() for outcome in found
    ]  # fmt: skip
    return {
        "schema_version": 1,
        "machine": f"{_processor()}, {arguments.jobs} thread{'s' if arguments.jobs > 1 else ''}",
        "versions": {
            "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
        },
        "seed": arguments.seed,
        "trials_per_cell": arguments.trials,
        "num_trials": sum(len(trials) for trials in tally.trials.values()),
        "seconds": round(seconds, 1),
        "control": {"steps": tally.control["steps"], "equal": tally.control["equal"]},
        "false_positives": {
            "checks": tally.clean_checks, "alarms": tally.false_alarms,
            "bound_95": 3.0 / tally.clean_checks if not tally.false_alarms else None,
        },
        "cells": [row for dtype, trials in tally.trials.items() for row in cells(dtype, trials)],
        "curve": [row for dtype, trials in tally.trials.items() for row in curve(dtype, trials)],
        "outcomes": [row for dtype, found in tally.outcomes.items() for row in outcome_summary(dtype, found)],
        "outcome_points": points,
    }  # fmt: skip


def _or_none(value: float) -> float | None:
    """JSON has no infinity."""
    return value if math.isfinite(value) else None


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if os.path.exists("/proc/cpuinfo") else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench campaign", description=__doc__)
    parser.add_argument("--trials", type=int, default=1000, help="of each site, kind and dtype (default: 1000)")
    parser.add_argument("--clean-checks", type=int, default=1_000_000, help="checks without a fault (default: 1e6)")
    parser.add_argument("--outcomes", type=int, default=40, help="faults of each setting that are left alone, seen and "
                        "unseen ones (default: 40)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="processes, of one thread each (default: 1)")
    parser.add_argument("--json", type=result_file, help="write the result here, too")
    parser.add_argument("--picture", type=result_file, help="write a heat map here (PNG)")
    arguments = parser.parse_args(words)
    if min(arguments.trials, arguments.clean_checks, arguments.outcomes, arguments.jobs) < 1:
        parser.error("--trials, --clean-checks, --outcomes and --jobs must be at least 1")
    result = run(arguments)
    show(result)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if arguments.picture is not None:
        from campaign.picture import draw

        draw(result, arguments.picture)
    control = result["control"]
    return 0 if control["equal"] == control["steps"] and not result["false_positives"]["alarms"] else 1
