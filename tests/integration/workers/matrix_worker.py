"""Trains each case plain, protected, and protected with faults; writes what it found as JSON lines. One rank of two.

Every case runs in the same two processes: importing torch and DeepSpeed takes longer than training these models.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from ending import leave
from matrix_cases import CASES, Case
from torch import nn

from resilience.config import Config
from resilience.context import RunContext
from resilience.deepspeed import hook
from resilience.events import Decision
from resilience.guard.fingerprint import fingerprint
from resilience.guard.reporter import SilentReporter

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
from train_tiny import Model, batch

NUM_STEPS = 6
FAULTS = """
[[fault]]
step = 2
rank = 0
site = "linear.out"
layer = 0
kind = "inf"

[[fault]]
step = 5
rank = 1
micro_step = {micro_step}
site = "gradient"
layer = 0
kind = "scale"
factor = {factor}
"""


class Convolution(nn.Module):
    """Batch statistics, dropout, numpy and Python randomness; returns what is no scalar. Sizes that two ranks do not
    divide: under ZeRO-3 their shards are padded.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, 15)
        self.convolution = nn.Conv1d(15, 33, 3, padding=1)
        self.norm = nn.BatchNorm1d(33)
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(33, 64)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.convolution(self.embedding(tokens).transpose(1, 2))
        x = self.dropout(self.norm(x)) * float(1 + 0.01 * np.random.rand())
        return self.head(x.transpose(1, 2))


def build_model(case: Case) -> nn.Module:
    if case.model == "gpt":
        return Model()
    if case.model == "convolution":
        return Convolution()
    import transformers

    common: dict[str, Any] = {"vocab_size": 64, "attn_implementation": case.attention, "use_cache": False}
    config: Any
    if case.model == "gpt2":
        config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=32, **common)
    else:
        config = transformers.LlamaConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            attention_dropout=0.1,
            **common,
        )
    model = transformers.AutoModelForCausalLM.from_config(config)
    if case.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": case.checkpointing == "reentrant"})
    return model


def build_engine(case: Case) -> Any:
    torch.manual_seed(1234)
    np.random.seed(1234)
    model = build_model(case)
    zero: dict[str, Any] = {"stage": case.zero}
    if case.sharded:
        zero["stage3_param_persistence_threshold"] = 0
    if case.offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 4,
        # Under no_sync DeepSpeed counts nothing: the script owns the accumulation.
        "gradient_accumulation_steps": 1 if case.boundary == "no_sync" else case.accumulation,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 4, "warmup_max_lr": 1e-3}},
        "gradient_clipping": 1.0,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1_000_000,
    }
    if case.precision != "fp32":
        config[case.precision] = {"enabled": True}
    if case.precision == "fp16":
        config["fp16"].update(initial_scale_power=8, loss_scale_window=2, loss_scale=case.loss_scale)
    if case.boundary in ("script", "apart"):
        config["managed_gradient_accumulation"] = False
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    return engine


def forward(case: Case, engine: Any, step: int, micro_step: int) -> torch.Tensor:
    tokens, targets = batch(step, micro_step, dist.get_rank())
    if case.model == "gpt":
        return engine(tokens, targets, torch.tensor(1.0))
    if case.model == "convolution":
        return nn.functional.cross_entropy(engine(tokens).float().flatten(0, 1), targets.flatten())
    loss: torch.Tensor = engine(input_ids=tokens, labels=tokens).loss
    return loss


def train_step(case: Case, engine: Any, step: int) -> list[torch.Tensor]:
    losses = []
    if case.boundary == "joint":
        for micro_step in range(case.accumulation):
            pair = [forward(case, engine, step, 2 * micro_step + part) for part in (0, 1)]
            losses += pair
            engine.backward(pair[0] + 0.5 * pair[1])
            engine.step()
        return losses
    if case.boundary == "apart":
        losses += [forward(case, engine, step, part) for part in (0, 1)]
        losses += [engine.backward(loss) for loss in losses]
        engine.step()
        return losses
    for micro_step in range(case.accumulation):
        is_last = micro_step == case.accumulation - 1
        if case.boundary == "forced":
            engine.set_gradient_accumulation_boundary(is_last)
        silent = case.boundary == "no_sync" and not is_last
        with engine.no_sync() if silent else contextlib.nullcontext():
            loss = forward(case, engine, step, micro_step)
            losses.append(loss)
            if case.backward == "direct":
                # As Hugging Face's Trainer does: the loss is scaled in place first.
                engine.scale(loss.mul_(0.5)).backward() if case.precision == "fp16" else loss.mul_(0.5).backward()
            else:
                losses.append(engine.backward(loss))
        if is_last or case.boundary == "managed":
            engine.step()
    return losses


def state_of(engine: Any) -> list[int]:
    """Fingerprints of all that a step may change on this rank: weights, masters, moments, buffers, generators."""
    tensors = [getattr(parameter, "ds_tensor", parameter) for parameter in engine.module.parameters()]
    base = getattr(engine.optimizer, "optimizer", engine.optimizer)
    for master, state in base.state.items():
        tensors += [master, *(value for value in state.values() if isinstance(value, torch.Tensor))]
    tensors += [buffer for _, buffer in sorted(engine.module.named_buffers())]
    tensors += [torch.get_rng_state(), torch.from_numpy(np.random.get_state()[1].astype(np.int64))]
    marks = [int(fingerprint(tensor)) for tensor in tensors if tensor.numel()]
    scale = int(getattr(engine.optimizer, "loss_scale", 0) or 0)
    return [*marks, engine.global_steps, engine.micro_steps, engine.skipped_steps, engine.global_samples, scale]


@contextlib.contextmanager
def guarded(engine: Any, case: Case, faults: bool, strength: str) -> Iterator[list[Decision]]:
    decisions: list[Decision] = []
    with tempfile.TemporaryDirectory() as directory:
        run_dir = Path(directory)
        plan = run_dir / "faults.toml"
        # Finite in fp16 too, where an overflow would be the loss scaler's business.
        plan.write_text(
            FAULTS.format(micro_step=case.accumulation - 1, factor=200.0 if case.precision == "fp16" else 1e5)
        )
        context = RunContext(
            run_id="matrix",
            run_dir=run_dir,
            coordinator_address="127.0.0.1:1",
            config=Config.model_validate({"detection": {"strength": strength}}),
            fault_plan=plan if faults else None,
        )
        hook.protect(engine, context, reporter=SilentReporter(on_decision=decisions.append))
        try:
            yield decisions
        finally:
            hook.release(engine)


def run(case: Case, *, strength: str = "", faults: bool = False) -> tuple[dict[str, Any], list[int], list[float]]:
    engine = build_engine(case)
    protection = guarded(engine, case, faults, strength) if strength else contextlib.nullcontext([])
    losses: list[float] = []
    with protection as decisions:
        for step in range(1, NUM_STEPS + 1):
            losses += [float(loss) for loss in train_step(case, engine, step)]
        guard = hook.guarded(engine)
        deterministic = guard.guard.boundary.deterministic if guard is not None else None
    state = state_of(engine)
    engine.destroy()
    report = {
        "actions": [f"{decision.step}:{decision.action}:{decision.outcome}" for decision in decisions],
        "reasons": [decision.reason for decision in decisions],
        "deterministic": deterministic,
    }
    return report, state, losses


def computes_fp16() -> bool:
    return bool(get_accelerator().is_fp16_supported())


def is_equal(first: Any, second: Any) -> bool:
    """Whether they are equal on every rank."""
    same = torch.tensor(int(repr(first) == repr(second)))
    dist.all_reduce(same, op=dist.ReduceOp.MIN)
    return bool(same)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--only", default="")
    args = parser.parse_args()
    dist.init_process_group("gloo")
    for case in CASES:
        if args.only not in case.name or (case.precision == "fp16" and not computes_fp16()):
            continue
        _, plain, plain_losses = run(case)
        clean, clean_state, clean_losses = run(case, strength="checksum")
        faulty, faulty_state, faulty_losses = run(case, strength="checksum", faults=True)
        result = {
            "case": case.name,
            "clean_equal": is_equal(plain, clean_state),
            "clean_losses_equal": is_equal(plain_losses, clean_losses),
            "faulty_equal": is_equal(plain, faulty_state),
            "faulty_losses_equal": is_equal(plain_losses, faulty_losses),
            "finite": all(math.isfinite(loss) for loss in plain_losses),
            "clean": clean,
            "faulty": faulty,
        }
        if dist.get_rank() == 0:
            with args.output.open("a", encoding="utf-8") as file:
                file.write(json.dumps(result) + "\n")
    dist.destroy_process_group()
    leave()


if __name__ == "__main__":
    main()
