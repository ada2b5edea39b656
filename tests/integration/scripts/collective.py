"""Ranks that only meet in all-reduces: starts fast, knows nothing of this package, can be told to misbehave."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist


def end(code: int) -> None:
    if code < 0:
        os.kill(os.getpid(), -code)
    if code == 1:
        raise ValueError("bad data: 3")
    # sys.exit with a live process group would abort in gloo's destructor, and the code would be lost.
    os._exit(code)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int, default=None)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--seconds-per-step", type=float, default=0.05)
    parser.add_argument("--exit-at", type=int, default=-1, help="in the first generation, on the last rank")
    parser.add_argument("--exit-code", type=int, default=1, help="negative for a signal")
    parser.add_argument("--every-generation", action="store_true")
    parser.add_argument("--child", action="store_true", help="start a child process that would outlive its rank")
    parser.add_argument("--deaf", action="store_true", help="ignore SIGTERM")
    parser.add_argument("--buffer", action="store_true", help="leave shared memory behind, as DeepSpeed does")
    options, _ = parser.parse_known_args()

    dist.init_process_group("gloo")
    rank, generation = dist.get_rank(), int(os.environ["RESILIENCE_GENERATION"])
    assert options.local_rank in (None, int(os.environ["LOCAL_RANK"]))
    world_size, port = dist.get_world_size(), os.environ["MASTER_PORT"]
    print(f"rank {rank} of {world_size} generation {generation} port {port}", flush=True)
    if options.deaf:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if options.child:
        # The working directory on its command line is how a test finds it.
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", os.getcwd()])
    if options.buffer:
        where = f"{os.environ['MASTER_ADDR']}_{port}"
        Path(f"/dev/shm/deepspeed_allreduce_buffer_{os.getuid()}_{where}_{rank}").touch()
    for step in range(1, options.steps + 1):
        total = torch.ones(1)
        dist.all_reduce(total)
        assert total.item() == world_size
        if rank == 0:
            print(f"step {step} generation {generation}", flush=True)
        if step == options.exit_at and rank == world_size - 1 and (generation == 1 or options.every_generation):
            end(options.exit_code)
        time.sleep(options.seconds_per_step)
    dist.destroy_process_group()
    print(f"rank {rank} done", flush=True)


if __name__ == "__main__":
    main()
