"""The embedded coordinator: started beside the runner, restarted on the same port when it dies, ended with the run.

It lives in a session of its own, so that a Ctrl-C on the terminal does not reach it before the agents have told it how
the run ended, and it gets SIGTERM from the kernel when the runner dies.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

from resilience.clock import Clock, SystemClock
from resilience.config import CoordinatorConfig
from resilience.context import RunContext
from resilience.errors import CoordinatorUnreachableError, ExitCode, ResilienceError, UsageError
from resilience.launch import shim
from resilience.launch.network import free_port, is_free
from resilience.launch.run_directory import RunDirectory

__all__ = ["EmbeddedCoordinator", "choose_metrics_port", "choose_port"]

DEFAULT_METRICS_PORT = 9464
_START_S = 30.0
_STOP_S = 15.0
_BACKOFF_S = (0.0, 0.5, 1.0, 2.0, 5.0)
_OWN = "resilience: "
"""Begins the one line by which a command of ours ends in failure."""
_END_BYTES = 1 << 16
"""Of its log, in which its last words are looked for."""
_STABLE_S = 30.0
"""After so long a life the next death counts as the first one again."""


def choose_port(config: CoordinatorConfig) -> int:
    """The gRPC port: the explicit one if it is free, else any.

    Raises:
        UsageError: the explicit port is busy.
    """
    if config.port:
        return _explicit(config.bind, config.port, "coordinator.port")
    return free_port(config.bind)


def choose_metrics_port(config: CoordinatorConfig) -> int:
    """The Prometheus port: the explicit one, else 9464, else any.

    Raises:
        UsageError: the explicit port is busy.
    """
    if config.metrics_port:
        return _explicit(config.metrics_bind, config.metrics_port, "coordinator.metrics_port")
    if config.metrics_port is None and is_free(config.metrics_bind, DEFAULT_METRICS_PORT):
        return DEFAULT_METRICS_PORT
    return free_port(config.metrics_bind)


def _explicit(host: str, port: int, key: str) -> int:
    if not is_free(host, port):
        raise UsageError(f"{key} = {port}: in use on {host}; give a free port, or leave it out for any free one")
    return port


class EmbeddedCoordinator:
    """One coordinator process at a time, on ports that stay."""

    def __init__(
        self, directory: RunDirectory, context: RunContext, *, metrics_port: int, clock: Clock | None = None
    ) -> None:
        self._directory = directory
        self._context = context
        self._host, _, port = context.coordinator_address.rpartition(":")
        self._port = int(port)
        self._metrics_port = metrics_port
        self._metrics_address: str | None = None
        self._clock = clock or SystemClock()
        self._process: subprocess.Popen[bytes] | None = None
        self._started_at = 0.0
        self._restart_at: float | None = None
        self._num_deaths = 0
        self._log_begin = 0
        """Where in the log the words of the present process begin."""
        self._told = ""
        """How the last one ended, as it was said."""

    @property
    def pid(self) -> int | None:
        """The coordinator's process, while there is one."""
        return None if self._process is None else self._process.pid

    @property
    def metrics_address(self) -> str | None:
        """`host:port` of the Prometheus endpoint, as the coordinator itself told it; None until it has."""
        return self._metrics_address

    def start(self) -> None:
        """Start it; it takes a second or two until it listens."""
        self._write_address()  # before it writes the same itself, and where its metrics are
        self._spawn()

    def wait_until_ready(self) -> None:
        """Wait until it listens and has written where.

        Raises:
            UsageError, CoordinatorUnreachableError: it ended at once; the message is its own last line.
        """
        deadline = self._clock.monotonic() + _START_S
        while not (self._has_told() and self._listens()):
            if self._process is not None and self._process.poll() is not None:
                raise self._failed_to_start(self._process.returncode)
            if self._clock.monotonic() > deadline:
                raise CoordinatorUnreachableError(f"coordinator: silent after {_START_S:.0f} s; see {self.log}")
            threading.Event().wait(0.05)

    @property
    def log(self) -> Path:
        """What it prints."""
        return self._directory.logs / "coordinator.log"

    def supervise(self) -> None:
        """Call it often: starts the coordinator again when it has died. Never waits."""
        now = self._clock.monotonic()
        if self._restart_at is not None:
            if now >= self._restart_at:
                self._start_again(now)
            return
        if self._process is None or self._process.poll() is None:
            return
        self._num_deaths = 1 if now - self._started_at > _STABLE_S else self._num_deaths + 1
        delay_s = _BACKOFF_S[min(self._num_deaths, len(_BACKOFF_S)) - 1]
        self._tell_end(self._process.returncode)
        self._restart_at = now + delay_s

    def _tell_end(self, code: int) -> None:
        """Once for each reason: it may end again and again, as long as a disk is full."""
        said = self._last_words() if code > 0 else ""  # who is killed says nothing
        ended = f"ended with {code}: {said}" if said else f"ended with {code}"
        if ended != self._told or self._num_deaths == 1:
            print(f"resilience: the coordinator {ended}; starting it again", file=sys.stderr)
        self._told = ended

    def _last_words(self) -> str:
        """The line by which it said why it ended; empty where it did not."""
        own = [line for line in self._lines() if line.startswith(_OWN)]
        return own[-1].removeprefix(_OWN) if own else ""

    def _lines(self) -> list[str]:
        """The end of what it has printed."""
        with contextlib.suppress(OSError), self.log.open("rb") as log:
            log.seek(max(self._log_begin, log.seek(0, os.SEEK_END) - _END_BYTES))
            return [line for line in log.read().decode(errors="replace").splitlines() if line.strip()]
        return []

    def _start_again(self, now: float) -> None:
        self._restart_at = None
        try:
            self._spawn()
            self._write_address()
        except OSError as error:
            # A full disk or table of processes is no reason to end healthy ranks: they go on without a coordinator.
            print(f"resilience: the coordinator cannot be started ({error}); trying again", file=sys.stderr)
            self._restart_at = now + _BACKOFF_S[-1]

    def stop(self) -> None:
        """End it: SIGTERM, on which it writes its report, then SIGKILL."""
        self._restart_at = None
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _spawn(self) -> None:
        command = [
            *(sys.executable, "-I", "-S", shim.__file__, "exec", str(os.getpid()), str(int(signal.SIGTERM))),
            *(sys.executable, "-m", "resilience.coordinator", "--context", str(self._directory.context)),
            *("--port", str(self._port), "--metrics-port", str(self._metrics_port)),
        ]
        with self.log.open("ab") as log:
            self._log_begin = log.seek(0, os.SEEK_END)
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        self._started_at = self._clock.monotonic()

    def _write_address(self) -> None:
        with contextlib.suppress(OSError):  # the storage is full: the coordinator itself writes the same, or says so
            self._directory.write_coordinator(
                address=self._context.coordinator_address,
                metrics_address=self._metrics_address,
                pid=self.pid,
                context=self._context,
            )

    def _has_told(self) -> bool:
        with contextlib.suppress(OSError):
            told = json.loads(self._directory.coordinator.read_text(encoding="utf-8"))["metrics_address"]
            if told is not None:
                self._metrics_address, self._metrics_port = told, int(told.rpartition(":")[2])
        return self._metrics_address is not None

    def _listens(self) -> bool:
        try:
            with socket.create_connection((self._host, self._port), timeout=0.5):
                return True
        except OSError:
            return False

    def _failed_to_start(self, code: int) -> ResilienceError:
        said = self._last_words() or [f"ended with {code}", *self._lines()][-1]
        message = f"coordinator: {said} (see {self.log})"
        return UsageError(message) if code == ExitCode.USAGE else CoordinatorUnreachableError(message)
