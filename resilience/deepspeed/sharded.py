"""What a ZeRO checkpoint's shards say of each parameter, put together anew: the measure of every conversion.

It reads the shards themselves, by DeepSpeed's own tables of what lies where, and nothing that a conversion made. The
files are mapped, so that only what is asked for is read. They are unpickled: verify them first.

    kind     of each parameter, flat, row-major: `fp32` (the master), `exp_avg`, `exp_avg_sq` (Adam's moments)
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from resilience.errors import CheckpointError

__all__ = ["KINDS", "MASTER", "Sharded", "bits"]

MASTER = "fp32"
KINDS = (MASTER, "exp_avg", "exp_avg_sq")
_OPTIMIZER_FILE = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt\Z")
_MODEL_FILE = "mp_rank_00_model_states.pt"


@dataclasses.dataclass(frozen=True, slots=True)
class _Piece:
    """A run of elements of one parameter in one shard."""

    shard: int
    group: int
    start: int
    """In the group's flat tensor."""
    offset: int
    """In the parameter."""
    length: int


class Sharded:
    """One ZeRO checkpoint of one model-parallel rank."""

    def __init__(self, tag_dir: Path) -> None:
        """Open the shards.

        Raises:
            CheckpointError: they are of a kind that cannot be put together, or do not fit each other.
            OSError: a file cannot be read.
        """
        self._tag_dir = tag_dir
        paths = _shards(tag_dir)
        self._states: list[Mapping[str, Any]] = [_load(path)["optimizer_state_dict"] for path in paths]
        self.num_shards = len(paths)
        """Data-parallel ranks that saved it."""
        self.stage = int(self._states[0].get("zero_stage", 1))
        """1, 2 or 3."""
        self.model = _load(tag_dir / self._model_file(0))
        """What rank 0 saved beside its shard."""
        self._inner: list[Mapping[str, Any]] = [state[self._inner_key] for state in self._states]
        _require_adam(tag_dir, self._inner)
        self._pieces = self._find_pieces()
        self.numels = {name: sum(piece.length for piece in pieces) for name, pieces in self._pieces.items()}
        """Elements of each parameter that the optimizer owns, by name."""
        self._require_whole()
        self.param_groups: Sequence[Mapping[str, Any]] = self._inner[0]["param_groups"]
        """Hyperparameters of each group of the optimizer."""

    @property
    def loss_scaler(self) -> dict[str, Any]:
        """What DeepSpeed's loss scaler knew, by attribute; empty where none was saved."""
        scaler = self._states[0].get("loss_scaler")
        return dict(vars(scaler)) if scaler is not None else {}

    @property
    def _inner_key(self) -> str:
        return "optimizer_state_dict" if self.stage == 3 else "base_optimizer_state"

    def _model_file(self, shard: int) -> str:
        return f"zero_pp_rank_{shard}_{_MODEL_FILE}" if self.stage == 3 else _MODEL_FILE

    def read(self, kind: str, name: str, offset: int = 0, length: int | None = None) -> torch.Tensor:
        """Elements `offset` to `offset + length` (the end, if not given) of one kind of one parameter; (length,)."""
        end = self.numels[name] if length is None else offset + length
        found = [
            self._flat(kind, piece).narrow(0, piece.start + max(offset - piece.offset, 0), stop - start)
            for piece in self._pieces[name]
            if (start := max(offset, piece.offset)) < (stop := min(end, piece.offset + piece.length))
        ]
        return torch.cat(found) if found else torch.empty(0)

    def steps(self) -> list[float]:
        """How many steps each group's moments have seen; empty where the optimizer counts elsewhere.

        Raises:
            CheckpointError: the shards disagree.
        """
        seen = [[_step(state) for _, state in sorted(inner["state"].items())] for inner in self._inner]
        if any(each != seen[0] for each in seen):
            raise CheckpointError(f"{self._tag_dir}: its shards were saved at different steps {seen}")
        return [step for step in seen[0] if step is not None]

    def model_of(self, rank: int) -> Mapping[str, Any]:
        """What rank `rank` saved beside its shard: its buffers. Rank 0's, where it saved none."""
        if self.stage != 3 or not 0 < rank < self.num_shards:
            return self.model
        return _load(self._tag_dir / self._model_file(rank))

    def frozen(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The parameters that no optimizer owns, whole and flat, by name."""
        shapes = self.model.get("frozen_param_shapes") or {}
        if self.stage != 3:
            owned = self._pieces.keys() | set(self.model.get("buffer_names") or ())
            yield from (
                (name, tensor.detach().reshape(-1))
                for name, tensor in self.model["module"].items()
                if name not in owned
            )
            return
        models = [self.model_of(shard) for shard in range(self.num_shards)] if shapes else []
        for name, shape in shapes.items():
            parts = [model["frozen_param_fragments"][name].reshape(-1) for model in models]
            yield name, torch.cat(parts)[: math.prod(shape)]

    def _flat(self, kind: str, piece: _Piece) -> torch.Tensor:
        if kind != MASTER:
            flat = self._inner[piece.shard]["state"][piece.group][kind]
        elif self.stage == 3:
            flat = self._states[piece.shard]["fp32_flat_groups"][piece.group]
        else:
            flat = self._states[piece.shard]["single_partition_of_fp32_groups"][piece.group]
        assert isinstance(flat, torch.Tensor)
        return flat.detach().reshape(-1)

    def _find_pieces(self) -> dict[str, list[_Piece]]:
        pieces: dict[str, list[_Piece]] = {}
        for shard in range(self.num_shards):
            found = self._of_stage_3(shard) if self.stage == 3 else self._of_slices(shard, pieces)
            for name, piece in found:
                pieces.setdefault(name, []).append(piece)
        return pieces

    def _of_slices(self, shard: int, before: Mapping[str, list[_Piece]]) -> list[tuple[str, _Piece]]:
        """ZeRO 1 and 2 list what lies where in each shard; the pieces follow each other in the order of the ranks."""
        found = []
        for group, mapping in enumerate(self._states[shard]["param_slice_mappings"]):
            for name, address in mapping.items():
                offset = sum(piece.length for piece in before.get(name, ()))
                found.append((name, _Piece(shard, group, address.start, offset, address.numel)))
        return found

    def _of_stage_3(self, shard: int) -> list[tuple[str, _Piece]]:
        """ZeRO 3 gives each rank an equal part of each parameter, the last ones padded."""
        found = []
        for group, shapes in enumerate(self.model["param_shapes"]):
            start = 0
            for name, shape in shapes.items():
                numel = math.prod(shape)
                size = math.ceil(numel / self.num_shards)
                length = max(0, min(size, numel - shard * size))
                found.append((name, _Piece(shard, group, start, shard * size, length)))
                start += size
        return found

    def _require_whole(self) -> None:
        shapes = {name: shape for group in self.model["param_shapes"] for name, shape in group.items()}
        for name, shape in shapes.items():
            held, numel = self.numels.get(name, 0), math.prod(shape)
            if held != numel:
                raise CheckpointError(
                    f"{self._tag_dir}: its shards hold {held} of {numel} elements of {name}; take another checkpoint"
                )


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor: what two tensors have in common that are equal bit for bit, NaN and −0 included."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _shards(tag_dir: Path) -> list[Path]:
    """The optimizer's files in the order of the data-parallel ranks."""
    found: dict[int, Path] = {}
    for path in tag_dir.iterdir():
        match = _OPTIMIZER_FILE.match(path.name)
        if match is None:
            if "_expert_" in path.name and path.name.endswith("_states.pt"):
                raise CheckpointError(f"{tag_dir}: a mixture of experts ({path.name}) cannot be converted")
            continue
        if int(match[2]) != 0:
            raise CheckpointError(
                f"{tag_dir}: of several model-parallel ranks ({path.name}); only data-parallel ones can be converted"
            )
        found[int(match[1])] = path
    if not found:
        raise CheckpointError(f"{tag_dir}: has no ZeRO shards: any number of ranks can load it as it is")
    missing = sorted(set(range(max(found) + 1)) - found.keys())
    if missing:
        raise CheckpointError(f"{tag_dir}: the shard of data-parallel rank {missing[0]} is missing")
    return [path for _, path in sorted(found.items())]


def _load(path: Path) -> Mapping[str, Any]:
    try:
        content: Mapping[str, Any] = torch.load(path, map_location="cpu", mmap=True, weights_only=False)
    except RuntimeError as error:
        raise CheckpointError(f"{path}: cannot be read ({' '.join(str(error).split())})") from None
    return content


def _require_adam(tag_dir: Path, optimizers: Sequence[Mapping[str, Any]]) -> None:
    """DeepSpeed converts Adam's two moments: it would drop others without a word, and needs both."""
    for optimizer in optimizers:
        if not isinstance(optimizer, Mapping):
            raise CheckpointError(f"{tag_dir}: was saved with zero_optimization.elastic_checkpoint; switch that off")
        if not optimizer.get("state"):
            raise CheckpointError(f"{tag_dir}: was saved before the optimizer's first step; load it with as many ranks")
        for state in optimizer["state"].values():
            moments = {key for key, value in state.items() if isinstance(value, torch.Tensor) and value.dim()}
            if moments != set(KINDS[1:]):
                raise CheckpointError(
                    f"{tag_dir}: the optimizer keeps {', '.join(sorted(moments)) or 'no moments'}; DeepSpeed converts "
                    "optimizers that keep exp_avg and exp_avg_sq only (Adam, AdamW, LAMB)"
                )


def _step(state: Mapping[str, Any]) -> float | None:
    return float(state["step"]) if "step" in state else None
