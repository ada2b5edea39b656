"""A training script on Accelerate: it forces the boundary and steps inside backward. It does not know `resilience`."""

import argparse
import json
from pathlib import Path

import torch
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.utils import DataLoaderConfiguration, set_seed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int, default=0)
    parser.add_argument("--checkpoints", required=True)
    parser.add_argument("--deepspeed_config", required=True)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--save-every", type=int, default=0)
    parser.add_argument("--seedable", action="store_true", help="the data's order follows from seed and epoch alone")
    args = parser.parse_args()

    accelerator = Accelerator(
        deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=args.deepspeed_config),
        gradient_accumulation_steps=2,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=args.seedable),
    )
    set_seed(5)
    model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Dropout(0.1), nn.Linear(64, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=20, gamma=0.5)
    x = torch.randn(512, 16, generator=torch.Generator().manual_seed(1))
    loader = DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=4, shuffle=True)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    own = Path(args.checkpoints) / "own"
    seen, average = 0, 0.0
    if args.save_every and (own / "progress.json").exists():
        accelerator.load_state(str(own))
        seen, average = json.loads((own / "progress.json").read_text())
    step, epoch, place = seen // 2, 0, 0
    while step < args.steps:
        loader.set_epoch(epoch)
        for features, target in loader:
            place += 1
            if place <= seen:
                continue
            with accelerator.accumulate(model):
                loss = nn.functional.mse_loss(model(features.to(next(model.parameters()).dtype)).float(), target)
                accelerator.backward(loss)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            average = 0.9 * average + 0.1 * loss.item()
            if not accelerator.sync_gradients:
                continue
            step += 1
            if step % 10 == 0:
                # In one write: ranks share the launcher's output.
                accelerator.print(
                    f"step {step} average {average:.9f} lr {scheduler.get_last_lr()}\n", end="", flush=True
                )
            if args.save_every and step % args.save_every == 0:
                accelerator.save_state(str(own))
                accelerator.wait_for_everyone()
                if accelerator.is_main_process:
                    (own / "progress.json").write_text(json.dumps([place, average]))
            if step >= args.steps:
                break
        epoch += 1
    model.save_checkpoint(str(Path(args.checkpoints) / "final"))
    accelerator.print(f"done at step {step}\n", end="", flush=True)
    accelerator.end_training()


if __name__ == "__main__":
    main()
