"""Launches real runs for the end-to-end tests, waits on conditions, and shows that nothing is left behind."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import psutil

from resilience.snapshot.arena import Arena

T = TypeVar("T")

SCRIPTS = Path(__file__).parent / "scripts"
TINY = SCRIPTS / "train_tiny.py"
BIN = Path(sys.executable).parent

DEEPSPEED_CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 2,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 2},
    "steps_per_print": 1_000_000,
}


def free_port() -> int:
    """A free port below the range from which the kernel serves everybody who asks for any."""
    for port in random.sample(range(20_000, 30_000), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("0.0.0.0", port))
            return port
    raise AssertionError("no free port between 20000 and 30000")


def wait_for(condition: Callable[[], T], *, what: str, timeout_s: float = 120.0) -> T:
    """The first true value of `condition`; an assertion that names `what` after `timeout_s` seconds."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.05)
    raise AssertionError(f"waited {timeout_s:.0f} s for {what}")


def _path() -> str:
    """PATH with this Python's commands first, once: where it differs, DeepSpeed compiles its operator again."""
    path = os.environ["PATH"]
    return path if path.startswith(f"{BIN}:") else f"{BIN}:{path}"


class Run:
    """One `deepspeed` launch in a process group of its own."""

    def __init__(
        self,
        directory: Path,
        *,
        script_args: list[str] | None = None,
        launch_args: list[str] | None = None,
        faults: str | None = None,
        resilience: str | None = None,
        deepspeed_config: Mapping[str, Any] = DEEPSPEED_CONFIG,
        plain: bool = False,
        script: Path = TINY,
    ) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self.run_dir = directory / "run"
        self.checkpoints = directory / "checkpoints"
        self.script = script
        self.master_port = free_port()
        (directory / "ds_config.json").write_text(json.dumps(deepspeed_config))
        command = [str(BIN / "deepspeed"), "--num_gpus", "2", "--master_port", str(self.master_port)]
        if not plain:
            command += ["--resilience", "--resilience-dir", str(self.run_dir)]
            if faults is not None:
                (directory / "faults.toml").write_text(faults)
                command += ["--resilience-faults", str(directory / "faults.toml")]
            if resilience is not None:
                (directory / "resilience.toml").write_text(resilience)
                command += ["--resilience-config", str(directory / "resilience.toml")]
        command += [*(launch_args or []), str(script), "--deepspeed_config", str(directory / "ds_config.json")]
        command += ["--checkpoints", str(self.checkpoints), *(script_args or [])]
        self.log = directory / "output.log"
        environment = {
            **os.environ,
            "PATH": _path(),
            "OMP_NUM_THREADS": "1",
            "XDG_STATE_HOME": str(directory / "state"),
        }
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=directory, start_new_session=True
            )

    def wait(self, timeout_s: float = 180.0) -> int:
        """The exit code."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout_s:.0f} s:\n{self.output()[-4000:]}") from None

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def report(self) -> dict[str, Any]:
        path = self.run_dir / "report.json"
        assert path.exists(), f"no report.json:\n{self.output()[-4000:]}"
        report: dict[str, Any] = json.loads(path.read_text())
        return report

    def processes(self) -> list[psutil.Process]:
        """Every live process that was started for this run, found by the run's own paths on its command line."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
                if process.status() != psutil.STATUS_ZOMBIE and str(self.directory) in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def find(self, *words: str) -> psutil.Process:
        """The process with all `words` on its command line; waits until there is one."""

        def look() -> psutil.Process | None:
            for process in self.processes():
                with contextlib.suppress(psutil.NoSuchProcess):
                    if all(word in " ".join(process.cmdline()) for word in words):
                        return process
            return None

        return wait_for(look, what=f"a process with {words} on its command line")

    def rank(self, rank: int) -> psutil.Process:
        """The process of a rank."""

        def look() -> psutil.Process | None:
            for process in self.processes():
                with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                    command = " ".join(process.cmdline())
                    is_script = self.script.name in command and "launch" not in command
                    # The kernel remembers the environment of a forked rank's standby process; on one node its
                    # local rank, which is on its command line, is its rank.
                    own = process.environ().get("RANK")
                    is_rank = own == str(rank) if own else f"--local_rank={rank} " in f"{command} "
                    if is_script and is_rank:
                        return process
            return None

        return wait_for(look, what=f"the process of rank {rank}")

    def wait_for_line(self, text: str, timeout_s: float = 120.0) -> None:
        def look() -> bool:
            assert self.process.poll() is None or text in self.output(), (
                f"ended with {self.process.poll()} before {text!r}:\n{self.output()[-4000:]}"
            )
            return text in self.output()

        wait_for(look, what=f"{text!r} in the output", timeout_s=timeout_s)

    def shared_memory(self) -> list[str]:
        """What this run, and no other on this machine, left in /dev/shm: buffers by the ports it met at, arenas by
        what they say of themselves."""
        ports = {self.master_port}
        for endpoint in self.run_dir.glob("logs/generation-*/endpoint-*.json"):
            ports.add(json.loads(endpoint.read_text())["master_port"])
        mine = tuple(f"_{port}_" for port in ports)
        buffers = [
            entry.name
            for entry in Path("/dev/shm").iterdir()
            if entry.name.startswith("deepspeed_allreduce_buffer") and any(port in entry.name for port in mine)
        ]
        return buffers + [path.name for path in self.arenas()]

    def arenas(self) -> list[Path]:
        """Arenas of this run in /dev/shm."""
        found = []
        for path in Path("/dev/shm").glob(f"resilience-{os.getuid()}-*"):
            owner = Arena(path).owner()
            if owner is not None and owner.run_dir == str(self.run_dir):
                found.append(path)
        return found

    def assert_nothing_left(self, timeout_s: float = 30.0) -> None:
        wait_for(
            lambda: not self.processes(), what=f"the end of all processes of {self.directory}", timeout_s=timeout_s
        )
        wait_for(lambda: not self.shared_memory(), what="an empty /dev/shm", timeout_s=timeout_s)

    def close(self) -> None:
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(10)
        for name in self.shared_memory():
            path = Path("/dev/shm") / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


@contextlib.contextmanager
def launched(directory: Path, **options: Any) -> Iterator[Run]:
    """A run that is ended, with all its processes, when the test leaves."""
    run = Run(directory, **options)
    try:
        yield run
    finally:
        run.close()


def resilience(*words: str, cwd: Path, state: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the `resilience` command."""
    environment = {**os.environ}
    if state is not None:
        environment["XDG_STATE_HOME"] = str(state)
    return subprocess.run(
        [str(BIN / "resilience"), *words],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def digest(directory: Path, tag: str | None = None) -> str:
    """`resilience digest` of a checkpoint."""
    target = directory / "checkpoints"
    answer = resilience("digest", str(target / tag if tag else target), "--json", cwd=directory)
    assert answer.returncode == 0, answer.stderr
    return str(json.loads(answer.stdout)["digest"])
