"""From a checkpoint of one number of ranks to a live engine of another, by DeepSpeed's universal checkpoints.

DeepSpeed's own loading of them is known to leave things out, so what it leaves out is put in here, and then everything
that the engine holds is compared with the source's shards, bit for bit. Collective, but for `run_conversion`.

What DeepSpeed 0.19.8 gets wrong: it leaves out the module's buffers and the frozen parameters. With ZeRO 3 it gives all
groups the hyperparameters of the first, and one and the same count of steps, a tensor that each group's step advances:
with two groups Adam counts every step twice from then on. `load_universal` is on for one load only, because what is
saved later must be ordinary.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

from resilience.context import CONTEXT_VARIABLE
from resilience.deepspeed.sharded import KINDS, MASTER, Sharded, bits
from resilience.deepspeed.shards import Held, Role, holdings
from resilience.errors import CheckpointError

__all__ = ["complete", "differences", "loading_universally", "run_conversion", "unsupported"]


def unsupported(engine: Any) -> str:
    """Why an engine cannot load what another number of ranks saved; empty if it can."""
    for what, is_so in (
        ("a mixture of experts", engine.has_moe_layers),
        ("pipeline parallelism", engine.pipeline_parallelism),
        ("tensor or sequence parallelism", engine.mp_world_size > 1 or engine.sequence_parallel_size > 1),
        ("optimizer state on NVMe", engine.zero_nvme_offload_optimizer()),
    ):
        if is_so:
            return what
    return ""


def run_conversion(source: Path, target: Path) -> None:
    """DeepSpeed's conversion in a process of its own; `source` was verified, `target` is not there yet.

    Raises:
        CheckpointError: it failed, with the last line of what it said.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "resilience.deepspeed.convert_process", str(source), str(target), str(os.getpid())]
    environment = {name: value for name, value in os.environ.items() if name != CONTEXT_VARIABLE}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        reason = said[-1] if said else f"its process ended with {done.returncode}"
        raise CheckpointError(f"{source} cannot be converted for another number of ranks: {reason}")


@contextlib.contextmanager
def loading_universally(engine: Any) -> Iterator[None]:
    """DeepSpeed's `load_universal` for what happens inside."""
    config = engine._config
    before = config.load_universal_checkpoint
    config.load_universal_checkpoint = True
    try:
        yield
    finally:
        config.load_universal_checkpoint = before


def complete(engine: Any, sharded: Sharded, *, strict: bool) -> None:
    """Put right what DeepSpeed's universal load gets wrong.

    Args:
        engine: it has just loaded the universal form of the checkpoint.
        sharded: the checkpoint.
        strict: whether a frozen parameter that was not saved is an error, as in an ordinary load.

    Raises:
        CheckpointError: the source has other groups of parameters, or lacks a frozen one.
    """
    groups = _base(engine).param_groups
    if len(groups) != len(sharded.param_groups):
        raise CheckpointError(
            f"the optimizer has {len(groups)} groups of parameters and the checkpoint {len(sharded.param_groups)}"
        )
    for group, saved in zip(groups, sharded.param_groups, strict=True):
        group.update({key: value for key, value in saved.items() if key != "params"})
    for state in _base(engine).state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone()
    with torch.no_grad():
        _fill_buffers(engine.module, sharded.model_of(torch.distributed.get_rank())["module"])
        _fill_frozen(engine.module, sharded, strict)


def _fill_buffers(module: torch.nn.Module, saved: Mapping[str, torch.Tensor]) -> None:
    for name, buffer in module.named_buffers():
        if name in saved:
            buffer.copy_(saved[name])


def _fill_frozen(module: torch.nn.Module, sharded: Sharded, strict: bool) -> None:
    wanted = {name: each for name, each in module.named_parameters() if _is_frozen(each) and name not in sharded.numels}
    if not wanted:
        return
    for name, whole in sharded.frozen():
        if name in wanted:
            _fill(wanted.pop(name), whole)
    if wanted and strict:
        raise CheckpointError(f"the checkpoint lacks the frozen parameter {next(iter(wanted))}")


def _is_frozen(parameter: Any) -> bool:
    return not parameter.requires_grad and bool(getattr(parameter, "ds_numel", parameter.numel()))


def _fill(parameter: Any, whole: torch.Tensor) -> None:
    shard = getattr(parameter, "ds_tensor", None)
    if shard is not None:
        size = parameter.partition_numel()
        mine = whole[torch.distributed.get_rank(parameter.ds_process_group) * size :][:size]
        shard.view(-1)[: mine.numel()].copy_(mine)
    if shard is None or parameter.ds_status == ZeroParamStatus.AVAILABLE:
        parameter.data.copy_(whole.view(parameter.shape))


def differences(engine: Any, sharded: Sharded) -> list[str]:
    """What this rank holds otherwise than the source's shards say, in words; empty if nothing. Collective.

    Compared are masters, moments, weights, buffers, counts of steps and hyperparameters; that all ranks together hold
    every element of every master and moment exactly once; and that no two tensors of the optimizer are one.
    """
    found: list[str] = []
    held = {name: dict.fromkeys(KINDS, 0) for name in sharded.numels}
    frozen = dict(sharded.frozen()) if any(_is_frozen(each) for each in engine.module.parameters()) else {}
    for each in holdings(engine):
        kind = _kind(each)
        if each.role is not Role.WEIGHT and each.parameter in held and kind in KINDS:
            held[each.parameter][kind] += each.length
        expected = _expected(each, kind, sharded, frozen)
        if expected is not None and not torch.equal(bits(each.read()).cpu(), bits(expected)):
            found.append(f"{each.name} differs from what was saved")
    found += _missing(engine, sharded, held)
    found += _other_counters(engine, sharded)
    saved = sharded.model_of(torch.distributed.get_rank())["module"]
    for name, buffer in engine.module.named_buffers():
        if name in saved and not torch.equal(bits(buffer).cpu(), bits(saved[name])):
            found.append(f"the buffer {name} differs from what was saved")
    return found


def _kind(held: Held) -> str:
    return MASTER if held.role is Role.MASTER else held.name.partition(" of ")[0]


def _expected(held: Held, kind: str, sharded: Sharded, frozen: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """The elements that should be there; None where the source has nothing of the kind."""
    name, end = held.parameter, held.offset + held.length
    if held.role is not Role.WEIGHT:
        if name not in sharded.numels or kind not in KINDS:
            return torch.empty(0)
        return sharded.read(kind, name, held.offset, held.length)
    dtype = held.read().dtype
    if sharded.stage == 3 and name in sharded.numels:
        return sharded.read(MASTER, name, held.offset, held.length).to(dtype)
    if sharded.stage != 3 and name in sharded.model["module"]:
        return sharded.model["module"][name].reshape(-1)[held.offset : end]  # type: ignore[no-any-return]
    return frozen[name][held.offset : end].to(dtype) if name in frozen else None


def _missing(engine: Any, sharded: Sharded, held: Mapping[str, Mapping[str, int]]) -> list[str]:
    """Elements that no rank holds, or several."""
    rows = [[held[name][kind] for kind in KINDS] for name in sharded.numels]
    counts = torch.tensor(rows, dtype=torch.int64, device=engine.device)
    torch.distributed.all_reduce(counts)
    return [
        f"all ranks together hold {count} elements of the {kind} of {name}, and it has {numel}"
        for (name, numel), row in zip(sharded.numels.items(), counts.tolist(), strict=True)
        for kind, count in zip(KINDS, row, strict=True)
        if count != numel
    ]


def _other_counters(engine: Any, sharded: Sharded) -> list[str]:
    base, found = _base(engine), []
    steps = {float(state["step"]) for state in base.state.values() if "step" in state}
    if steps != set(sharded.steps()):
        found.append(f"the optimizer has counted {sorted(steps)} steps, and {sorted(set(sharded.steps()))} were saved")
    for number, (group, saved) in enumerate(zip(base.param_groups, sharded.param_groups, strict=True)):
        wrong = [key for key, value in saved.items() if key != "params" and group.get(key) != value]
        if wrong:
            found.append(f"{wrong[0]} of group {number} is {group.get(wrong[0])}, and {saved[wrong[0]]} was saved")
    scaler = vars(getattr(engine.optimizer, "loss_scaler", None) or object)
    if any(scaler.get(key) != value for key, value in sharded.loss_scaler.items()):
        found.append("the loss scaler is not as it was saved")
    tensors = [each for state in base.state.values() for each in state.values() if isinstance(each, torch.Tensor)]
    places = [each.data_ptr() for each in tensors if each.numel()]
    if len(set(places)) != len(places):
        found.append("two tensors of the optimizer's state share their memory")
    return found


def _base(engine: Any) -> Any:
    return getattr(engine.optimizer, "optimizer", engine.optimizer)
