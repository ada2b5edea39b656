"""The digest of a checkpoint: one SHA-256 over its consolidated fp32 weights, the same for every number of ranks.

What is hashed, for each name in the order of its code points:

    one line of JSON, `["<name>","<dtype>",[<shape>]]`, and a newline
    the tensor's bytes, contiguous, little-endian

Floating-point tensors are taken as float32: for ZeRO 1 to 3 the optimizer's fp32 masters, put together by DeepSpeed's
own zero_to_fp32; buffers and frozen parameters are cast. Integer and boolean buffers keep their dtype. Tied weights
count under each of their names. ZeRO 0 has no named masters: there the module's own weights are taken, cast, and in
bf16 or fp16 the optimizer's masters follow under `optimizer.<key>.<group>.<index>`, so that a difference that rounding
hides is found as well; such a digest compares with others of ZeRO 0 only.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from deepspeed.utils import zero_to_fp32

from resilience.errors import CheckpointError

__all__ = ["consolidated", "digest"]

_MODEL_FILE_WITHOUT_SHARDS = "mp_rank_00_model_states.pt"
_UNIVERSAL = "zero"
_MASTER_KEYS = ("fp32_groups_flat", "fp32_groups")


def digest(tag_dir: Path) -> str:
    """SHA-256 of a checkpoint's consolidated weights, in hexadecimal.

    DeepSpeed unpickles the files: verify them first (`resilience.checkpoint.verify`).

    Raises:
        CheckpointError: it cannot be read, or is of a kind that cannot be consolidated.
    """
    state = hashlib.sha256()
    weights = dict(consolidated(tag_dir))
    for name in sorted(weights):
        tensor = _canonical(weights.pop(name))
        header = json.dumps([name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)], separators=(",", ":"))
        state.update(f"{header}\n".encode())
        state.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()


def consolidated(tag_dir: Path) -> Iterator[tuple[str, Any]]:
    """The weights by name, each as something with `.contiguous()`: shards are put together one at a time.

    Raises:
        CheckpointError: see `digest`.
    """
    try:
        if (tag_dir / _UNIVERSAL).is_dir():
            yield from _universal(tag_dir)
        elif any(tag_dir.glob("*zero_pp_rank_*_optim_states.pt")):
            # It reports its progress on standard output, which belongs to the caller.
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                weights = zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint(
                    str(tag_dir.parent), tag=tag_dir.name, lazy_mode=True
                )
            yield from weights.items()
        else:
            yield from _without_shards(tag_dir / _MODEL_FILE_WITHOUT_SHARDS)
    except (OSError, RuntimeError, ValueError, KeyError, NotImplementedError) as error:
        words = " ".join(str(error).split())
        raise CheckpointError(f"{tag_dir}: cannot be consolidated ({type(error).__name__}: {words})") from None


def _universal(tag_dir: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """What zero_to_fp32 says of the checkpoint that a universal one was made of: the digests of both are equal."""
    model_files = sorted(tag_dir.glob("*_model_states.pt"), key=_shard)
    models = [torch.load(path, map_location="cpu", mmap=True, weights_only=False) for path in model_files]
    first = models[0]
    weights: dict[str, torch.Tensor] = {name: first["module"][name] for name in first["buffer_names"]}
    for name, shape in (first.get("frozen_param_shapes") or {}).items():
        fragments = [model["frozen_param_fragments"][name].reshape(-1) for model in models]
        weights[name] = torch.cat(fragments)[: shape.numel()].view(shape)
    shapes = first["param_shapes"]
    for group in [shapes] if isinstance(shapes, dict) else shapes:
        for name, shape in group.items():
            path = tag_dir / _UNIVERSAL / name / "fp32.pt"
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=False)
            weights[name] = (content["param"] if isinstance(content, dict) else content).view(shape)
    weights |= {name: weights[source] for name, source in first["shared_params"].items() if source in weights}
    yield from weights.items()


def _shard(path: Path) -> int:
    """The data-parallel rank in a file's name; the files of one rank alone have none."""
    found = re.match(r"zero_pp_rank_(\d+)_", path.name)
    return int(found[1]) if found else 0


def _without_shards(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    content = torch.load(path, map_location="cpu", mmap=True, weights_only=False)
    yield from content["module"].items()
    optimizer = content.get("optimizer") or {}
    for key in _MASTER_KEYS:
        for group, masters in enumerate(optimizer.get(key, [])):
            for index, master in enumerate(_tensors(masters)):
                yield f"optimizer.{key}.{group}.{index}", master


def _tensors(masters: torch.Tensor | Iterable[torch.Tensor]) -> Iterable[torch.Tensor]:
    return [masters] if isinstance(masters, torch.Tensor) else masters


def _canonical(tensor: Any) -> torch.Tensor:
    whole: torch.Tensor = tensor.contiguous().detach().cpu()
    return whole.to(torch.float32) if whole.is_floating_point() else whole
