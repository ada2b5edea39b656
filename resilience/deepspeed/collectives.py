"""DeepSpeed's own collectives, watched: what goes into a reduction and what comes out of it. Reversible.

DeepSpeed reduces gradients through one object, `deepspeed.comm.comm.cdb`: all_reduce (ZeRO 0 and 1), reduce (ZeRO 1
and 2) and reduce_scatter_tensor (ZeRO 3), each waited for before it returns. Never here: sums, verdicts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.distributed as dist
from deepspeed.comm import comm
from deepspeed.comm.reduce_op import ReduceOp

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

    def stop() -> None:
        for name, method in watched.items():
            if own.get(name) is method:
                del own[name]
                own.update({name: before[name]} if name in before else {})

    return stop


def _is_sum_over_all(part: torch.Tensor, op: Any, group: Any) -> bool:
    return (
        part.is_floating_point()
        and part.is_contiguous()
        and part.numel() > 0
        and str(op).rpartition(".")[2] == "SUM"
        and dist.get_world_size(group) == dist.get_world_size() > 1
    )
