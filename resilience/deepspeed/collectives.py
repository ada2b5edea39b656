"""DeepSpeed's own collectives, watched: what goes into a reduction and what comes out of it. Reversible.

DeepSpeed reduces gradients through one object, `deepspeed.comm.comm.cdb`: all_reduce and reduce (ZeRO 0 to 2) and
reduce_scatter_tensor (ZeRO 3), each waited for before it returns. Never here: sums, verdicts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.distributed as dist
from deepspeed.comm import comm
from deepspeed.comm.reduce_op import ReduceOp
from deepspeed.runtime.zero import stage3

__all__ = ["ReductionListener", "watch_reductions"]

_SUM = ReduceOp.SUM


class ReductionListener(Protocol):
    """Told of each sum over all ranks of the job."""

    def goes_in(self, shards: torch.Tensor) -> None:
        """This rank's part, (1, n), or (ranks, n) where each rank gets a shard; it may be overwritten after."""

    def comes_out(self, result: torch.Tensor | None, shard: int) -> None:
        """The sum of one shard of what went in last; None where another rank has it."""


def watch_reductions(listener: ReductionListener) -> Callable[[], None]:
    """Tell `listener` of DeepSpeed's reductions from now on; the returned callable ends it."""
    backend: Any = comm.cdb
    if backend is None or not dist.is_initialized() or dist.get_world_size() == 1:
        return lambda: None
    all_reduce, reduce, reduce_scatter = backend.all_reduce, backend.reduce, backend.reduce_scatter_tensor
    sizes = _Sizes()

    def watched_all_reduce(tensor: Any, op: Any = _SUM, group: Any = None, async_op: bool = False) -> Any:
        if async_op or not _is_sum_over_all(tensor, op, group):
            return all_reduce(tensor, op, group, async_op)
        listener.goes_in(tensor.view(1, -1))
        returned = all_reduce(tensor, op, group, async_op)
        listener.comes_out(tensor, 0)
        return returned

    def watched_reduce(tensor: Any, dst: int, op: Any = _SUM, group: Any = None, async_op: bool = False) -> Any:
        if async_op or not _is_sum_over_all(tensor, op, group):
            return reduce(tensor, dst, op, group, async_op)
        listener.goes_in(tensor.view(1, -1))
        returned = reduce(tensor, dst, op, group, async_op)
        listener.comes_out(tensor if dst == dist.get_rank() else None, 0)
        return returned

    def watched_reduce_scatter(
        output_tensor: Any, input_tensor: Any, op: Any = _SUM, group: Any = None, async_op: bool = False
    ) -> Any:
        if async_op or not _is_sum_over_all(input_tensor, op, group):
            return reduce_scatter(output_tensor, input_tensor, op, group, async_op)
        _clear_padding(input_tensor, sizes.of_tensors)
        listener.goes_in(input_tensor.view(dist.get_world_size(), -1))
        returned = reduce_scatter(output_tensor, input_tensor, op, group, async_op)
        listener.comes_out(output_tensor, dist.get_rank())
        return returned

    watched = {
        "all_reduce": watched_all_reduce,
        "reduce": watched_reduce,
        "reduce_scatter_tensor": watched_reduce_scatter,
    }
    own = vars(backend)  # the class stays untouched
    before = {name: own[name] for name in watched if name in own}
    own.update(watched)
    note_no_more = sizes.note()

    def stop() -> None:
        note_no_more()
        for name, method in watched.items():
            if own.get(name) is method:
                del own[name]
                own.update({name: before[name]} if name in before else {})

    return stop


class _Sizes:
    """Of the tensors whose parts DeepSpeed has put side by side, while it reduces them together."""

    of_tensors: tuple[int, ...] = ()

    def note(self) -> Callable[[], None]:
        """Note them from now on; the returned callable ends it."""
        original = stage3.reduce_scatter_coalesced

        def noted(tensors: Any, group: Any = None) -> Any:
            self.of_tensors = tuple(tensor.numel() for tensor in tensors)
            try:
                return original(tensors, group)
            finally:
                self.of_tensors = ()

        def stop() -> None:
            if stage3.reduce_scatter_coalesced is noted:
                stage3.reduce_scatter_coalesced = original

        stage3.reduce_scatter_coalesced = noted
        return stop


def _clear_padding(flat: torch.Tensor, sizes: tuple[int, ...]) -> None:
    """What fills up parts to equal sizes is memory as it was found. It is never read, but sums would be of it."""
    num_ranks = dist.get_world_size()
    if flat.numel() != num_ranks * sum(-(-size // num_ranks) for size in sizes):
        return  # not put together so
    padding = _padding(sizes, num_ranks, flat.device)
    if padding.numel():
        flat.view(-1).index_fill_(0, padding, 0.0)


@functools.lru_cache(maxsize=1024)
def _padding(sizes: tuple[int, ...], num_ranks: int, device: torch.device) -> torch.Tensor:
    """Places of the padding, (n,), in the shards of all ranks one after the other: each has a part of each tensor, of
    ⌈size ÷ ranks⌉ elements (`deepspeed.runtime.comm.coalesced_collectives`).
    """
    parts = [-(-size // num_ranks) for size in sizes]
    places, offset = [torch.empty(0, dtype=torch.int64, device="cpu")], 0
    for size, part in zip(sizes, parts, strict=True):
        beyond = torch.arange(size, part * num_ranks, device="cpu")
        places.append(beyond // max(1, part) * sum(parts) + offset + beyond % max(1, part))
        offset += part
    return torch.cat(places).to(device)


def _is_sum_over_all(part: torch.Tensor, op: Any, group: Any) -> bool:
    return (
        part.is_floating_point()
        and part.is_contiguous()
        and part.numel() > 0
        and str(op).rpartition(".")[2] == "SUM"
        and dist.get_world_size(group) == dist.get_world_size() > 1
    )
