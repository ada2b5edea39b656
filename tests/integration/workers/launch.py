"""Starts a worker on two ranks, without our launcher, and reads the JSON lines that it wrote."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

__all__ = ["run_worker"]

WORKERS = Path(__file__).parent


def run_worker(worker: str, directory: Path, *, timeout_s: float) -> list[dict[str, Any]]:
    """Run `<worker>.py --output …` on two gloo ranks; returns the lines of its output."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    output = directory / "results.jsonl"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}"]
    command += [str(WORKERS / f"{worker}.py"), "--output", str(output)]
    # DeepSpeed rebuilds its op whenever the PATH on which it found ninja changes.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout_s
        )
    finally:
        for buffer in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"):
            buffer.unlink(missing_ok=True)
    assert done.returncode == 0, done.stdout[-6000:]
    return [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
