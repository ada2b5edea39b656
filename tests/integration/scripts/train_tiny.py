"""A small training script as a user would write it: it does not know `resilience`.

Its options make it misbehave the way scripts and data do: a NaN in the data, an exception in the code.
"""

import argparse
import os
import sys

import deepspeed
import torch
from torch import nn


class Attention(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        q, k, v = (
            projection(x).view(batch, length, self.num_heads, -1).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        scores = torch.matmul(q, k.transpose(-2, -1)) / (width // self.num_heads) ** 0.5
        mask = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        probs = self.dropout(torch.softmax(scores.masked_fill(mask, float("-inf")), dim=-1))
        return self.out_proj(torch.matmul(probs, v).transpose(1, 2).reshape(batch, length, width))


class Model(nn.Module):
    def __init__(self, vocabulary: int = 64, width: int = 32, num_layers: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.attention = nn.ModuleList(Attention(width, 2) for _ in range(num_layers))
        self.mlp = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
            for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for attention, mlp in zip(self.attention, self.mlp, strict=True):
            x = x + attention(x)
            x = x + mlp(self.norm(x))
        loss = nn.functional.cross_entropy(self.head(self.norm(x)).float().flatten(0, 1), targets.flatten())
        return loss * weight


def batch(step: int, micro_step: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Data that follows from the global step alone: 4 sequences of 16 tokens."""
    generator = torch.Generator().manual_seed(1_000_003 * step + 1_009 * micro_step + rank)
    tokens = torch.randint(0, 64, (4, 17), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int, default=0)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--save-every", type=int, default=4)
    parser.add_argument("--checkpoints", required=True)
    parser.add_argument("--nan-from-step", type=int, default=0, help="the data turn into NaN from this step on")
    parser.add_argument("--nan-steps", type=int, default=1, help="for so many steps")
    parser.add_argument("--raise-at-step", type=int, default=0, help="the code raises at this step, every time")
    deepspeed.add_config_arguments(parser)
    args = parser.parse_args()

    torch.manual_seed(1234)
    model = Model()
    engine, *_ = deepspeed.initialize(args=args, model=model, model_parameters=model.parameters())
    engine.load_checkpoint(args.checkpoints)
    rank = torch.distributed.get_rank()
    accumulation = engine.gradient_accumulation_steps()
    while engine.global_steps < args.steps:
        step = engine.global_steps + 1
        if step == args.raise_at_step:
            raise RuntimeError(f"the script's own mistake at step {step}")
        bad = args.nan_from_step and args.nan_from_step <= batch_number(engine) < args.nan_from_step + args.nan_steps
        for micro_step in range(accumulation):
            tokens, targets = batch(batch_number(engine), micro_step, rank)
            weight = torch.tensor(float("nan") if bad else 1.0)
            loss = engine(tokens.to(engine.device), targets.to(engine.device), weight.to(engine.device))
            engine.backward(loss)
            engine.step()
        if rank == 0 and engine.global_steps % 4 == 0:
            print(f"step {engine.global_steps} loss {loss.item():.6f} skipped {engine.skipped_steps}", flush=True)
        if engine.global_steps % args.save_every == 0:
            engine.save_checkpoint(args.checkpoints)
    if rank == 0:
        print(f"done at step {engine.global_steps}, skipped {engine.skipped_steps}, pid {os.getpid()}", flush=True)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    if "RESILIENCE_CONTEXT" not in os.environ:
        # gloo's threads may abort an interpreter that shuts down (torch 2.13), and plain DeepSpeed has nothing that
        # sees through it.
        sys.stdout.flush()
        os._exit(0)


def batch_number(engine: "deepspeed.DeepSpeedEngine") -> int:
    """Which batch comes next, from 1. `global_steps` counts skipped steps too, so no batch is used twice."""
    return int(engine.global_steps) + 1


if __name__ == "__main__":
    main()
