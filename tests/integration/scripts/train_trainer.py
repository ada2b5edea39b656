"""A training script on the Hugging Face Trainer: GPT-2 from a configuration. It does not know `resilience`."""

import argparse
import json
from pathlib import Path

import torch
import transformers
from torch.utils.data import Dataset
from transformers.trainer_utils import get_last_checkpoint


class Tokens(Dataset):
    def __init__(self, seed: int) -> None:
        self.rows = torch.randint(0, 64, (256, 16), generator=torch.Generator().manual_seed(seed))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int, default=0)
    parser.add_argument("--checkpoints", required=True)
    parser.add_argument("--deepspeed_config", required=True)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--save-every", type=int, default=0)
    parser.add_argument("--evaluate-every", type=int, default=20)
    args = parser.parse_args()

    config = json.loads(Path(args.deepspeed_config).read_text())
    config.update(train_batch_size="auto", gradient_clipping="auto")
    arguments = transformers.TrainingArguments(
        output_dir=args.checkpoints,
        deepspeed=config,
        max_steps=args.steps,
        per_device_train_batch_size=config["train_micro_batch_size_per_gpu"],
        gradient_accumulation_steps=config["gradient_accumulation_steps"],
        learning_rate=1e-3,
        warmup_steps=10,
        bf16=True,
        use_cpu=True,
        seed=11,
        logging_steps=10,
        save_strategy="steps" if args.save_every else "no",
        save_steps=args.save_every or 500,
        eval_strategy="steps" if args.evaluate_every else "no",
        eval_steps=args.evaluate_every or None,
        report_to=[],
        disable_tqdm=True,
    )
    transformers.set_seed(11)
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=32)
    )
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=Tokens(1), eval_dataset=Tokens(2))
    last = get_last_checkpoint(args.checkpoints) if Path(args.checkpoints).is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    trainer.deepspeed.save_checkpoint(str(Path(args.checkpoints) / "final"))
    if trainer.is_world_process_zero():
        print(f"done at step {trainer.state.global_step}", flush=True)
        for entry in trainer.state.log_history:
            kept = {key: value for key, value in entry.items() if key in ("step", "loss", "grad_norm", "eval_loss")}
            print("history", json.dumps(kept, sort_keys=True), flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
