"""From `kill -9` of a rank to the first new step: with and without warm standby, beside a start of stock DeepSpeed.

All are measured in one go, on the same model with the same checkpoint cadence. Times come from the script's own output,
the kill from here. What stock DeepSpeed needs is counted from its launch: nothing restarts it, so somebody has to.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from result_file import result_file

from resilience.launch.shared_memory import remove_buffers

SCRIPT = Path(__file__).parent / "recovery_rank.py"
_MARK = re.compile(r"^(?P<what>[a-z ]+?)(?: (?P<step>\d+))? at (?P<at>\d+\.\d+) rank (?P<rank>\d+) pid (?P<pid>\d+)$")
_SOURCE = re.compile(r"generation \d+ begins on \d+ ranks? from (?P<what>[^:;]*)")
_LIMIT_S = 120.0
_NUM_RANKS = 2


class BenchError(Exception):
    """A launch did not do what was waited for; one line says what."""


@dataclasses.dataclass(frozen=True)
class Mark:
    """One line of the script."""

    what: str
    step: int
    at: float
    rank: int
    pid: int


@dataclasses.dataclass(frozen=True)
class Recovery:
    """One measured recovery, in seconds since the kill, or since the launch."""

    first_step_s: float
    """Until the first new step is taken …"""
    begun_s: float
    """… and until it begins; how long it then takes is the script's affair."""
    lost_steps: int
    source: str
    phases: dict[str, float]
    """When the script of rank 0 had got how far."""


class Launch:
    """One `deepspeed` that trains until it is ended."""

    def __init__(self, directory: Path, words: list[str], script_words: list[str]) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._log = directory / "output.log"
        self._port = _free_port()
        command = ["deepspeed", "--num_gpus", str(_NUM_RANKS), "--master_port", str(self._port), *words]
        environment = {**os.environ, "XDG_STATE_HOME": str(directory / "state")}
        self.started_at = time.time()
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [*command, str(SCRIPT), *script_words],
                cwd=directory,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def output(self) -> str:
        return self._log.read_text(errors="replace")

    def marks(self) -> list[Mark]:
        found = (_MARK.match(line) for line in self.output().splitlines())
        return [Mark(m["what"], int(m["step"] or 0), float(m["at"]), int(m["rank"]), int(m["pid"])) for m in found if m]

    def wait_for(self, condition: Callable[[], Any], what: str) -> Any:
        deadline = time.monotonic() + _LIMIT_S
        while time.monotonic() < deadline and self._process.poll() is None:
            if value := condition():
                return value
            time.sleep(0.02)
        raise BenchError(f"waited for {what} in vain; the launch said:\n{self.output()[-2000:]}")

    def end(self) -> None:
        """End it with everything that it started."""
        for this in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, this)
            for mark in {mark.pid: mark for mark in self.marks()}.values() if this is signal.SIGKILL else ():
                _kill(mark.pid)
            try:
                self._process.wait(30)
            except subprocess.TimeoutExpired:
                continue
        remove_buffers([("127.0.0.1", self._port)])


def _kill(pid: int) -> None:
    """End a rank that stock DeepSpeed may leave behind, and nothing that has its pid by now."""
    with contextlib.suppress(ProcessLookupError, FileNotFoundError):
        if SCRIPT.name.encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
            os.kill(pid, signal.SIGKILL)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def launched(directory: Path, words: list[str], script_words: list[str]) -> Iterator[Launch]:
    launch = Launch(directory, words, script_words)
    try:
        yield launch
    finally:
        launch.end()


def measure_ours(
    directory: Path, script_words: list[str], *, is_warm: bool, interval_steps: int | str, repeats: int
) -> list[Recovery]:
    """Kill rank 1 of one run, again and again."""
    directory.mkdir(parents=True)
    config = {
        "launch": {"warm_standby": is_warm},
        "policy": {"max_restarts": repeats + 1},
        "snapshot": {"interval_steps": interval_steps},
    }
    (directory / "resilience.json").write_text(json.dumps(config))
    words = ["--resilience", "--resilience-dir", str(directory / "run")]
    words += ["--resilience-config", str(directory / "resilience.json")]
    standby = directory / "run" / "logs" / "standby-localhost.log"
    recoveries = []
    with launched(directory, words, script_words) as launch:
        seen: set[int] = set()
        launch.wait_for(lambda: (directory / "checkpoints" / "latest").exists(), "the first checkpoint")
        for _ in range(repeats):
            generation = launch.wait_for(lambda seen=seen: _trained(launch.marks(), seen), "some steps of each rank")
            if is_warm:
                launch.wait_for(lambda: standby.exists() and "ready with" in standby.read_text(), "the standby process")
            seen = seen | generation.keys()
            victim = next(pid for pid, rank in generation.items() if rank == 1)
            killed_at = time.time()
            os.kill(victim, signal.SIGKILL)
            recoveries.append(_recovery(launch, seen, killed_at))
    return recoveries


def _trained(marks: list[Mark], seen: set[int]) -> dict[int, int] | None:
    """Pid → rank of a new generation, once each of its ranks has taken three steps."""
    steps: dict[int, list[Mark]] = {}
    for mark in marks:
        if mark.what == "step" and mark.pid not in seen:
            steps.setdefault(mark.pid, []).append(mark)
    if len(steps) < _NUM_RANKS or min(map(len, steps.values())) < 3:
        return None
    return {pid: found[0].rank for pid, found in steps.items()}


def _recovery(launch: Launch, seen: set[int], killed_at: float) -> Recovery:
    last_step = max(mark.step for mark in launch.marks() if mark.what == "step" and mark.at <= killed_at)
    num_generations = len(_SOURCE.findall(launch.output()))

    def is_back() -> tuple[int, str, list[Mark]] | None:
        sources = _SOURCE.findall(launch.output())
        mine = [mark for mark in launch.marks() if mark.pid not in seen and mark.rank == 0]
        if len(sources) == num_generations and not mine:
            return None
        source = sources[-1] if sources else ""
        resumed = _resumed_step(source)
        new = [mark for mark in mine if mark.what == "step" and mark.step > resumed]
        return (resumed, source, mine) if new and sources else None

    resumed, source, marks = launch.wait_for(is_back, "the first step after a kill")
    first = next(mark for mark in marks if mark.what == "step" and mark.step > resumed)
    phases = {mark.what: mark.at - killed_at for mark in marks if mark.what != "step"}
    return Recovery(first.at - killed_at, _begun(marks, first) - killed_at, last_step - resumed, source, phases)


def _begun(marks: list[Mark], first: Mark) -> float:
    """A step begins where what the script said before it was done."""
    return max(mark.at for mark in marks if mark.at < first.at)


def _resumed_step(source: str) -> int:
    """The step whose state a generation begins with, from the words in which the coordinator says so."""
    numbers = re.findall(r"\d+", source)
    return int(numbers[0]) if numbers else 0


def measure_stock(directory: Path, script_words: list[str], *, repeats: int) -> list[Recovery]:
    """Launch stock DeepSpeed on its own checkpoint, again and again."""
    with launched(directory, [], script_words) as launch:
        launch.wait_for(lambda: (directory / "checkpoints" / "latest").exists(), "stock DeepSpeed's checkpoint")
        launch.wait_for(lambda: _trained(launch.marks(), set()), "some steps")
    recoveries = []
    for _ in range(repeats):
        with launched(directory, [], script_words) as launch:
            launch.wait_for(lambda launch=launch: _steps(launch), "the first step")
            first = _steps(launch)[0]
            mine = [mark for mark in launch.marks() if mark.rank == 0]
            phases = {mark.what: mark.at - launch.started_at for mark in mine if mark.what != "step"}
            begun_s = _begun(mine, first) - launch.started_at
            recoveries.append(Recovery(first.at - launch.started_at, begun_s, 0, "its own checkpoint", phases))
    return recoveries


def _steps(launch: Launch) -> list[Mark]:
    return [mark for mark in launch.marks() if mark.what == "step" and mark.rank == 0]


def summary(recoveries: list[Recovery]) -> dict[str, Any]:
    """Median and spread."""
    names = recoveries[0].phases
    return {
        "first_step_s": _spread([recovery.first_step_s for recovery in recoveries]),
        "begun_s": _spread([recovery.begun_s for recovery in recoveries]),
        "lost_steps": [recovery.lost_steps for recovery in recoveries],
        "sources": sorted({re.sub(r"\d+", "N", recovery.source) for recovery in recoveries}),
        "phases_s": {name: statistics.median(r.phases[name] for r in recoveries if name in r.phases) for name in names},
    }


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "count": len(values)}


def show(model: str, kind: str, result: dict[str, Any]) -> None:
    times, begun, lost = result["first_step_s"], result["begun_s"], result["lost_steps"]
    phases = ", ".join(f"{name} {value:.2f}" for name, value in result["phases_s"].items())
    spread = f"({times['min']:.2f} to {times['max']:.2f}, n = {times['count']})"
    print(f"{model:5} {kind:16} {times['median']:6.2f} s  {spread}, the step begins at {begun['median']:.2f} s")
    print(f"      lost steps: {statistics.median(lost):g}; from {'; '.join(result['sources'])}; {phases}", flush=True)


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench recovery", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=("demo", "gpt2"), default=["demo", "gpt2"])
    parser.add_argument("--kinds", nargs="+", choices=("warm", "cold", "stock"), default=["warm", "cold", "stock"])
    parser.add_argument("--repeats", type=int, default=10, help="of each (default: 10)")
    parser.add_argument("--save-every", type=int, default=10, help="steps between two checkpoints (default: 10)")
    parser.add_argument("--snapshot-every", default="auto", help="steps between two snapshots (default: auto)")
    parser.add_argument("--micro-batch", type=int, default=4, help="sequences of a rank in a step (default: 4)")
    parser.add_argument("--json", type=result_file, help="write the results there")
    arguments = parser.parse_args(words)
    results: dict[str, dict[str, Any]] = {}
    try:
        for model in arguments.models:
            results[model] = _compare(model, arguments)
    except BenchError as error:
        print(f"scripts/bench recovery: {error}", file=sys.stderr)
        return 1
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"load_average": os.getloadavg(), "results": results}, indent=2))
    return 0


def _compare(model: str, arguments: argparse.Namespace) -> dict[str, Any]:
    found = {}
    for kind in arguments.kinds:
        with tempfile.TemporaryDirectory(prefix="bench-recovery-") as temporary:
            directory = Path(temporary) / kind
            config = Path(temporary) / "ds_config.json"
            config.write_text(json.dumps({**DEEPSPEED, "train_micro_batch_size_per_gpu": arguments.micro_batch}))
            script_words = ["--deepspeed_config", str(config), "--model", model, "--steps", "1000000"]
            script_words += ["--save_every", str(arguments.save_every), "--save_dir", str(directory / "checkpoints")]
            if kind == "stock":
                recoveries = measure_stock(directory, script_words, repeats=arguments.repeats)
            else:
                is_warm = kind == "warm"
                every = arguments.snapshot_every
                interval_steps = int(every) if every.isdecimal() else every
                recoveries = measure_ours(
                    directory, script_words, is_warm=is_warm, interval_steps=interval_steps, repeats=arguments.repeats
                )
        found[kind] = {**summary(recoveries), "recoveries": [dataclasses.asdict(recovery) for recovery in recoveries]}
        show(model, {"warm": "warm standby", "cold": "no standby", "stock": "stock DeepSpeed"}[kind], found[kind])
    return found


DEEPSPEED = {
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 2},
    "steps_per_print": 1_000_000,
}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
