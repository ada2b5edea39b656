"""What a rank keeps between two steps: weights, fp32 masters and moments, each part under its parameter's name.

Read from the optimizer wrappers of DeepSpeed 0.19.8, ZeRO 0 to 3, anew each time: DeepSpeed replaces storages as it
goes. Nothing here keeps a tensor alive. Never here: hashes, decisions.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.partition_parameters import GatheredParameters, ZeroParamStatus
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

__all__ = ["Held", "Holdings", "Role", "holdings", "watch_edits"]


class Role(enum.StrEnum):
    """What a tensor is to its parameter."""

    WEIGHT = "weight"
    MASTER = "master"
    MOMENT = "moment"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """A run of elements that this rank keeps for one parameter."""

    name: str
    """`layers.0.weight`; `shard of …` (ZeRO-3, beside the gathered copy); `master of …`; `exp_avg of …`."""
    parameter: str
    index: int
    """The parameter's place in `named_parameters`."""
    role: Role
    offset: int
    """Place of the first element within the parameter, in row-major order."""
    length: int
    """Number of elements."""
    width: int
    """Bytes of an element."""
    replicated: bool
    """Whether every rank of the job keeps the same."""
    is_frozen: bool
    """No optimizer step changes it."""
    read: Callable[[], torch.Tensor]
    """The elements as they lie now, (length,), contiguous, with the version counter of what they are a part of."""
    owners: Callable[[], tuple[torch.Tensor, ...]]
    """What it is a part of, and the parameter: whoever edits them moves a version counter."""

    def versions(self) -> tuple[int, ...]:
        """What moves when a script changes the tensor in place in a way that PyTorch sees, or replaces it."""
        return tuple(number for tensor in self.owners() for number in (tensor.data_ptr(), _version(tensor)))


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else int(tensor._version)


class _Group:
    """Masters of one group of an optimizer wrapper, flat: where they are, and which parameter lies where in them."""

    def __init__(self, master: Callable[[], torch.Tensor], parts: Sequence[tuple[Any, int, int, int]]) -> None:
        self.master = master
        self.parts = parts
        """(parameter, place in the master, number of elements, place in the parameter)"""


class Holdings:
    """`holdings` of an engine, walked again only where its structure may have changed: after `forget`, or when the
    optimizer has got new state (its first step makes the moments)."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._held: list[Held] = []
        self._structure: tuple[int, ...] = ()

    def __call__(self) -> list[Held]:
        base = _base(self._engine.optimizer)
        structure = tuple(len(state) for state in base.state.values())
        if structure != self._structure or not self._held:
            self._held, self._structure = holdings(self._engine), structure
        return self._held

    def forget(self) -> None:
        """Something may lie elsewhere now."""
        self._held = []


def _base(optimizer: Any) -> Any:
    """The optimizer that DeepSpeed's wrapper drives."""
    return getattr(optimizer, "optimizer", optimizer)


def holdings(engine: Any) -> list[Held]:
    """All that this rank keeps between two steps of `engine` (a `DeepSpeedEngine`), in an order that stays.

    Left out: buffers (the forward changes them), the optimizer's own counters of steps, what lies on NVMe, and tensors
    whose elements do not lie in row-major order (`channels_last`).
    """
    names = {id(parameter): (index, name) for index, (name, parameter) in enumerate(engine.module.named_parameters())}
    replicated = not engine.has_moe_layers and not engine.pipeline_parallelism and engine.mp_world_size == 1
    found = list(_weights(engine, names, replicated))
    weights_at = {held.read().data_ptr() for held in found}
    optimizer = engine.optimizer
    sharded = isinstance(optimizer, (DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3, BF16_Optimizer))
    base = _base(optimizer)
    for group in _groups(engine):
        found += _state(group, base, names, replicated and not sharded, weights_at)
    return found


def _weights(engine: Any, names: dict[int, tuple[int, str]], replicated: bool) -> Iterator[Held]:
    for parameter in engine.module.parameters():
        index, name = names[id(parameter)]
        common: dict[str, Any] = {
            "parameter": name,
            "index": index,
            "role": Role.WEIGHT,
            "is_frozen": not parameter.requires_grad,
        }
        shard = getattr(parameter, "ds_tensor", None)
        is_whole = shard is None or parameter.ds_status == ZeroParamStatus.AVAILABLE
        if is_whole and parameter.is_contiguous() and parameter.numel():
            yield Held(
                name=name,
                offset=0,
                length=parameter.numel(),
                width=parameter.element_size(),
                replicated=replicated,
                read=functools.partial(_flat, parameter),
                owners=functools.partial(_parameter, parameter),
                **common,
            )
        length = 0 if shard is None else _length_of_shard(parameter)
        if shard is not None and length:
            yield Held(
                name=f"shard of {name}" if is_whole else name,
                offset=_rank_in_group(parameter) * parameter.partition_numel(),
                length=length,
                width=shard.element_size(),
                replicated=False,
                read=functools.partial(_shard, parameter, length),
                owners=functools.partial(_parameter_and_shard, parameter),
                **common,
            )


def _rank_in_group(parameter: Any) -> int:
    return int(torch.distributed.get_rank(parameter.ds_process_group))


def _length_of_shard(parameter: Any) -> int:
    """Elements of the parameter itself in this rank's shard: no padding. 0 where the shard is elsewhere."""
    size = parameter.partition_numel()
    if parameter.ds_tensor.numel() != size:
        return 0
    return int(max(0, min(size, parameter.ds_numel - _rank_in_group(parameter) * size)))


def _groups(engine: Any) -> Iterator[_Group]:
    optimizer = engine.optimizer
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        for number, group in enumerate(optimizer.fp16_groups):
            yield _Group(functools.partial(_item, optimizer, "fp32_partitioned_groups_flat", number), _of_shards(group))
    elif isinstance(optimizer, (DeepSpeedZeroOptimizer, BF16_Optimizer)):
        is_bf16 = isinstance(optimizer, BF16_Optimizer)
        masters = "fp32_groups_flat_partition" if is_bf16 else "single_partition_of_fp32_groups"
        for number, group in enumerate(optimizer.bf16_groups if is_bf16 else optimizer.bit16_groups):
            yield _Group(functools.partial(_item, optimizer, masters, number), _of_fragments(group))
    elif isinstance(optimizer, FP16_Optimizer):
        for number, group in enumerate(optimizer.fp16_groups):
            yield _Group(functools.partial(_item, optimizer, "fp32_groups_flat", number), _one_by_one(group))
    elif isinstance(optimizer, FP16_UnfusedOptimizer):
        for masters, group in zip(optimizer.fp32_groups, optimizer.fp16_groups, strict=True):
            for master, parameter in zip(masters, group, strict=True):
                yield _Group(functools.partial(_itself, master), _one_by_one([parameter]))
    else:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                yield _Group(functools.partial(_itself, parameter), _one_by_one([parameter]))


def _of_shards(group: Sequence[Any]) -> list[tuple[Any, int, int, int]]:
    parts, place = [], 0
    for parameter in group:
        size = parameter.partition_numel()
        offset = _rank_in_group(parameter) * size
        parts.append((parameter, place, int(max(0, min(size, parameter.ds_numel - offset))), offset))
        place += size
    return parts


def _of_fragments(group: Sequence[Any]) -> list[tuple[Any, int, int, int]]:
    parts = []
    for parameter in group:
        mapping = parameter._hp_mapping
        if mapping is not None:
            master, weight = mapping.hp_fragment_address, mapping.lp_fragment_address
            parts.append((parameter, master.start, master.numel, weight.start))
    return parts


def _one_by_one(group: Sequence[Any]) -> list[tuple[Any, int, int, int]]:
    parts, place = [], 0
    for parameter in group:
        parts.append((parameter, place, parameter.numel(), 0))
        place += parameter.numel()
    return parts


def _state(
    group: _Group, base: Any, names: dict[int, tuple[int, str]], replicated: bool, weights_at: set[int]
) -> Iterator[Held]:
    master = group.master()
    moments = {
        key: value
        for key, value in base.state.get(master, {}).items()
        if isinstance(value, torch.Tensor) and value.numel() == master.numel() > 1 and value.is_contiguous()
    }
    sources: list[tuple[str, Role, Callable[[], torch.Tensor]]] = [("master", Role.MASTER, group.master)]
    sources += [(key, Role.MOMENT, functools.partial(_moment, base, group.master, key)) for key in sorted(moments)]
    for kind, role, source in sources:
        size, width = source().numel(), source().element_size()
        for parameter, place, length, offset in group.parts:
            # A master that is the weight itself is one tensor, not two; one that was swapped out is not here.
            is_weight = role is Role.MASTER and master.data_ptr() + place * master.element_size() in weights_at
            if not length or place + length > size or is_weight or not source().is_contiguous():
                continue
            index, name = names[id(parameter)]
            yield Held(
                name=f"{kind} of {name}",
                parameter=name,
                index=index,
                role=role,
                offset=offset,
                length=length,
                width=width,
                replicated=replicated,
                is_frozen=False,
                read=functools.partial(_part, source, place, length),
                owners=functools.partial(_alone, source),
            )


def _item(optimizer: Any, attribute: str, number: int) -> torch.Tensor:
    tensor: torch.Tensor = getattr(optimizer, attribute)[number]
    return tensor


def _itself(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _parameter(parameter: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (parameter,)


def _parameter_and_shard(parameter: Any) -> tuple[torch.Tensor, ...]:
    return parameter, parameter.ds_tensor


def _alone(source: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, ...]:
    return (source(),)


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().reshape(-1)


def _shard(parameter: Any, length: int) -> torch.Tensor:
    flat: torch.Tensor = parameter.ds_tensor.detach().view(-1)[:length]
    return flat


def _moment(base: Any, master: Callable[[], torch.Tensor], key: str) -> torch.Tensor:
    tensor: torch.Tensor = base.state[master()][key]
    return tensor


def _part(source: Callable[[], torch.Tensor], place: int, length: int) -> torch.Tensor:
    return source().detach().reshape(-1)[place : place + length]


_EDITS_OF_ENGINE = ("load_checkpoint", "load_module_state_dict", "offload_states", "reload_states")
_EDITS_OF_OPTIMIZER = (
    "load_state_dict",
    "refresh_fp32_params",
    "update_lp_params",
    "set_full_hp_param",
    "set_local_hp_param",
)


def _nothing() -> None:
    """Nobody wants to know."""


def watch_edits(
    engine: Any, edited: Callable[[], None] = _nothing, *, before: Callable[[], None] = _nothing
) -> Callable[[], None]:
    """Call `before` before and `edited` after each of DeepSpeed's own ways to write weights or optimizer state between
    the steps.

    They write through `.data`, which no version counter shows. The returned callable takes the wrappers out again.
    """
    undo = [_wrap(engine, name, before, edited) for name in _EDITS_OF_ENGINE]
    undo += [_wrap(engine.optimizer, name, before, edited) for name in _EDITS_OF_OPTIMIZER]
    undo += [_wrap(parameter, "set_full_hp_param", before, edited) for parameter in engine.module.parameters()]
    undo.append(_wrap_gathered(before, edited))

    def undo_all() -> None:
        for step in reversed(undo):
            step()

    return undo_all


def _wrap(target: Any, name: str, begin: Callable[[], None], edited: Callable[[], None]) -> Callable[[], None]:
    original = getattr(target, name, None)
    if not callable(original):
        return lambda: None
    before = target.__dict__.get(name)

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        begin()
        try:
            return original(*args, **kwargs)
        finally:
            edited()

    target.__dict__[name] = wrapper

    def undo() -> None:
        if target.__dict__.get(name) is not wrapper:
            return
        if before is None:
            del target.__dict__[name]
        else:
            target.__dict__[name] = before

    return undo


def _wrap_gathered(before: Callable[[], None], edited: Callable[[], None]) -> Callable[[], None]:
    """ZeRO-3's context in which a script may write gathered parameters."""
    original = GatheredParameters.__exit__

    def leave(self: Any, *exc: Any) -> Any:
        is_edit = self.enabled and self.src_rank is not None
        if is_edit:
            before()
        try:
            return original(self, *exc)
        finally:
            if is_edit:
                edited()

    GatheredParameters.__exit__ = leave

    def undo() -> None:
        if GatheredParameters.__exit__ is leave:
            GatheredParameters.__exit__ = original

    return undo
