"""Starts one `deepspeed` launch for a script of ours, waits for it, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from pathlib import Path

from resilience.launch.shared_memory import remove_buffers

LIMIT_S = 900
"""A launch that takes longer than this hangs."""


class LaunchError(Exception):
    """The launch did not end well; one line says how."""


class Aborted(LaunchError):
    """A rank died of SIGABRT."""


def launch(words: list[str], directory: Path) -> None:
    """Run `deepspeed --master_port <a free one> <words>` in `directory`.

    Raises:
        Aborted: a rank ended with SIGABRT.
        LaunchError: it failed otherwise, or took too long.
    """
    port = _free_port()
    command = ["deepspeed", "--master_port", str(port), *words]
    print(f"\n$ {' '.join(command)}", flush=True)
    # What is done here is no news about this machine: the devices' history stays in the launch's own directory.
    environment = {**os.environ, "XDG_STATE_HOME": str(directory / "state")}
    process = subprocess.Popen(command, cwd=directory, env=environment, start_new_session=True)
    try:
        exit_code = process.wait(LIMIT_S)
    except subprocess.TimeoutExpired:
        raise LaunchError(f"the launch did not end within {LIMIT_S} s") from None
    finally:
        _end_group(process)
        remove_buffers([("127.0.0.1", port)])  # plain DeepSpeed leaves its own
    if exit_code == -signal.SIGABRT & 0xFF:
        raise Aborted("a rank aborted")
    if exit_code != 0:
        raise LaunchError(f"the launch ended with exit code {exit_code}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End what a launch left, if anything: on an interrupt, too, nothing stays behind."""
    for this in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, this)
        except ProcessLookupError:
            return
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            continue
