"""The small training script with pauses: before each step of `--wait-at` it waits for a file of that name to appear.

It imports a module of its own (train_tiny.py beside it), as scripts do.
"""

import argparse
import os
import time
from pathlib import Path

import deepspeed
import torch
from train_tiny import Model, batch


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int, default=0)
    parser.add_argument("--checkpoints", required=True)
    parser.add_argument("--wait-at", type=int, nargs="*", default=[])
    parser.add_argument("--wait-for", type=Path, default=Path())
    deepspeed.add_config_arguments(parser)
    args = parser.parse_args()
    torch.manual_seed(1234)
    model = Model()
    engine, *_ = deepspeed.initialize(args=args, model=model, model_parameters=model.parameters())
    engine.load_checkpoint(args.checkpoints)
    rank = torch.distributed.get_rank()
    while engine.global_steps < 12:
        step = engine.global_steps + 1
        if step in args.wait_at:
            print(f"rank {rank} waits at step {step}, pid {os.getpid()}", flush=True)
            while not (args.wait_for / str(step)).exists():
                time.sleep(0.02)
        for micro_step in range(engine.gradient_accumulation_steps()):
            tokens, targets = batch(step, micro_step, rank)
            engine.backward(engine(tokens, targets, torch.tensor(1.0)))
            engine.step()
        if engine.global_steps % 4 == 0:
            engine.save_checkpoint(args.checkpoints)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    if "RESILIENCE_CONTEXT" not in os.environ:
        os._exit(0)  # as in train_tiny.py


if __name__ == "__main__":
    main()
