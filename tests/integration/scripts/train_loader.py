"""A training script as many write it: a shuffling DataLoader, a running average, an evaluation every few steps.

It does not know `resilience`. With `--save-every` it keeps checkpoints, and begins from the newest one.
"""

import argparse

import deepspeed
import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset


class Classifier(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Dropout(0.1), nn.Linear(64, 64), nn.GELU())
        self.head = nn.Linear(64, num_classes)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.head(self.body(x)).float()
        return nn.functional.cross_entropy(logits, y), logits


def data(num_classes: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(256, 32, generator=generator)
    return TensorDataset(x, (x[:, 0] * 2).long().clamp(0, num_classes - 1))


def dtype_of(engine: "deepspeed.DeepSpeedEngine") -> torch.dtype:
    return next(engine.module.parameters()).dtype


@torch.no_grad()
def evaluate(engine: "deepspeed.DeepSpeedEngine", loader: DataLoader) -> float:
    engine.eval()
    losses = [float(engine(x.to(dtype_of(engine)), y)[0]) for x, y in loader]
    engine.train()
    return sum(losses) / len(losses)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int, default=0)
    parser.add_argument("--checkpoints", required=True)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--save-every", type=int, default=0)
    parser.add_argument("--num-classes", type=int, default=8)
    parser.add_argument("--save-first", action="store_true", help="save what was begun with before the first step")
    parser.add_argument("--accuracy", action="store_true", help="read the logits in each training step")
    deepspeed.add_config_arguments(parser)
    args = parser.parse_args()

    torch.manual_seed(7)
    model = Classifier(args.num_classes)
    engine, *_ = deepspeed.initialize(args=args, model=model, model_parameters=model.parameters())
    rank = torch.distributed.get_rank()
    dataset, held_out = data(args.num_classes, 1), data(args.num_classes, 2)
    sampler = DistributedSampler(dataset, shuffle=True, seed=3)
    loader = DataLoader(dataset, batch_size=4, sampler=sampler)
    path, client = engine.load_checkpoint(args.checkpoints) if args.save_every else (None, None)
    average, seen = (client["average"], client["seen"]) if path else (0.0, 0)
    if args.save_first:
        engine.save_checkpoint(args.checkpoints, tag="begun", save_latest=False)
    epoch = seen // len(loader)
    while engine.global_steps < args.steps:
        sampler.set_epoch(epoch)
        for place, (x, y) in enumerate(loader):
            if epoch * len(loader) + place < seen:
                continue
            seen += 1
            loss, logits = engine(x.to(dtype_of(engine)), y)
            engine.backward(loss)
            engine.step()
            average = 0.9 * average + 0.1 * loss.item()
            if args.accuracy:
                average += 1e-3 * float((logits.argmax(-1) == y).float().mean())
            if not engine.was_step_applied():
                continue
            step = engine.global_steps
            if step % 10 == 0:
                evaluated = evaluate(engine, DataLoader(held_out, batch_size=64))
                if rank == 0:
                    print(f"step {step} average {average:.9f} evaluated {evaluated:.9f}", flush=True)
            if args.save_every and step % args.save_every == 0:
                engine.save_checkpoint(args.checkpoints, client_state={"average": average, "seen": seen})
            if step >= args.steps:
                break
        epoch += 1
    engine.save_checkpoint(args.checkpoints, tag="final")
    if rank == 0:
        print(f"done at step {engine.global_steps} average {average:.9f}", flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
