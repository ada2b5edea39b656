"""What scripts/bench_recovery.py trains: an ordinary script that says when each of its stages and steps ended.

    imported at 1700000000.123456 rank 0 pid 4711
    step 7 at 1700000001.123456 rank 0 pid 4711

It knows DeepSpeed and, for `--model gpt2`, Hugging Face transformers; never resilience.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

import deepspeed
import torch

SEED = 2025


def say(what: str) -> None:
    print(f"{what} at {time.time():.6f} rank {os.environ['RANK']} pid {os.getpid()}", flush=True)


def make_model(name: str) -> tuple[torch.nn.Module, int, int]:
    """The model, the size of its vocabulary, and how many tokens a sequence has."""
    if name == "demo":
        sys.path.append(str(Path(__file__).parent / "demo_gpt"))
        from train_gpt import GPT, SEQUENCE, VOCABULARY

        return GPT(), VOCABULARY, SEQUENCE
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=6, n_embd=768, n_head=12, n_positions=128, vocab_size=32_768)  # 67.8 M parameters
    return GPT2LMHeadModel(config), config.vocab_size, 32


def main() -> None:
    say("imported")
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int, default=-1)
    parser.add_argument("--model", choices=("demo", "gpt2"), required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--save_every", type=int, required=True)
    parser.add_argument("--save_dir", required=True)
    arguments = deepspeed.add_config_arguments(parser).parse_args()
    torch.manual_seed(SEED)
    model, vocabulary, length = make_model(arguments.model)
    say("model made")
    engine, *_ = deepspeed.initialize(args=arguments, model=model, model_parameters=model.parameters())
    say("initialized")
    engine.load_checkpoint(arguments.save_dir)
    say("loaded")
    rank = deepspeed.comm.get_rank()
    while engine.global_steps < arguments.steps:
        step = engine.global_steps + 1
        generator = torch.Generator().manual_seed(1000 * step + rank)
        size = (engine.train_micro_batch_size_per_gpu(), length + 1)
        tokens = torch.randint(vocabulary, size, generator=generator).to(engine.device)
        if arguments.model == "demo":
            loss = engine(tokens[:, :-1], tokens[:, 1:])
        else:
            loss = engine(tokens, labels=tokens).loss
        engine.backward(loss)
        engine.step()
        say(f"step {step}")
        if step % arguments.save_every == 0:
            engine.save_checkpoint(arguments.save_dir)
    deepspeed.comm.destroy_process_group()


if __name__ == "__main__":
    main()
