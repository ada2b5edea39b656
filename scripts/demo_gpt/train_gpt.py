"""A byte-level GPT, trained by DeepSpeed on the text of Python's own standard library.

An ordinary training script: it knows DeepSpeed and nothing else of what may surround it. The data of a step follow from
the step's number alone, so a run that starts again from a checkpoint sees what it would have seen.
"""

from __future__ import annotations

import argparse
import sysconfig
import time
from pathlib import Path

import deepspeed
import numpy as np
import torch
from torch import nn
from torch.nn import functional

SEED = 2025
VOCABULARY = 256
SEQUENCE = 256


class Attention(nn.Module):
    """Causal self-attention, written out: matmul, softmax, matmul. Shapes: B batch, H heads, T tokens, D head width."""

    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("future", torch.ones(SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x.shape
        q, k, v = (
            project(x).view(batch, tokens, self.num_heads, -1).transpose(1, 2) for project in (self.q, self.k, self.v)
        )
        scores = torch.matmul(q, k.transpose(-2, -1)) * q.shape[-1] ** -0.5  # [B, H, T, T]
        scores = scores.masked_fill(self.future[:tokens, :tokens], float("-inf"))
        context = torch.matmul(self.dropout(scores.softmax(dim=-1)), v)  # [B, H, T, D]
        return self.out(context.transpose(1, 2).reshape(batch, tokens, width))


class Block(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, num_heads, dropout)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(dropout)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """Predicts the next byte; `forward` returns the mean cross-entropy in nats."""

    def __init__(self, num_layers: int = 4, width: int = 256, num_heads: int = 4, dropout: float = 0.1) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(VOCABULARY, width), nn.Embedding(SEQUENCE, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.Sequential(*(Block(width, num_heads, dropout) for _ in range(num_layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.token(tokens) + self.position.weight[: tokens.shape[1]]
        logits = self.head(self.norm(self.blocks(self.dropout(x))))
        return functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def read_text() -> np.ndarray:
    """The standard library's own modules, one after the other, as a read-only array of bytes."""
    library = Path(sysconfig.get_paths()["stdlib"])
    return np.frombuffer(b"".join(path.read_bytes() for path in sorted(library.glob("*.py"))), dtype=np.uint8)


def read_batch(text: np.ndarray, batch_size: int, *, step: int, micro_step: int, rank: int) -> torch.Tensor:
    """[batch_size, SEQUENCE + 1] tokens; a counter-based generator makes them a function of the address alone."""
    generator = np.random.Generator(np.random.Philox(key=SEED, counter=[0, rank, micro_step, step]))
    starts = generator.integers(0, len(text) - SEQUENCE - 1, size=batch_size)
    return torch.from_numpy(text[starts[:, None] + np.arange(SEQUENCE + 1)].astype(np.int64))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the launcher")
    parser.add_argument("--steps", type=int, default=80, help="optimizer steps to train (default: 80)")
    parser.add_argument("--save_dir", default="checkpoints", help="where checkpoints go (default: ./checkpoints)")
    parser.add_argument("--save_every", type=int, default=20, help="steps between two checkpoints (default: 20)")
    parser.add_argument("--log_every", type=int, default=10, help="steps between two lines of output (default: 10)")
    return deepspeed.add_config_arguments(parser).parse_args()


def main() -> None:
    arguments = parse_arguments()
    torch.manual_seed(SEED)
    model = GPT()
    engine, *_ = deepspeed.initialize(args=arguments, model=model, model_parameters=model.parameters())
    rank = deepspeed.comm.get_rank()
    torch.manual_seed(SEED + rank)  # each rank drops out other activations
    engine.load_checkpoint(arguments.save_dir)
    text = read_text()
    if rank == 0:
        print(f"training on {len(text):,} bytes from step {engine.global_steps}", flush=True)

    started_at = time.perf_counter()
    while engine.global_steps < arguments.steps:
        step = engine.global_steps + 1
        for micro_step in range(engine.gradient_accumulation_steps()):
            size = engine.train_micro_batch_size_per_gpu()
            batch = read_batch(text, size, step=step, micro_step=micro_step, rank=rank).to(engine.device)
            loss = engine(batch[:, :-1], batch[:, 1:])
            engine.backward(loss)
            engine.step()
        if rank == 0 and step % arguments.log_every == 0:
            print(f"step {step}: loss {loss.item():.4f}, {time.perf_counter() - started_at:.1f} s", flush=True)
        if step % arguments.save_every == 0 or step == arguments.steps:
            engine.save_checkpoint(arguments.save_dir)


if __name__ == "__main__":
    main()
    deepspeed.comm.destroy_process_group()
