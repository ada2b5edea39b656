"""What comes before every handler on a CUDA device: the current device, and graphs that are captured or about to be.

The kernels of aten in C++ make their tensors' device the current one, on which Triton launches; an override in Python
must do so itself. What is captured into a CUDA graph runs again without any Python: it cannot be checked. Before that
inductor runs it once in the memory of the graph, of which nothing but the results may be kept: torch raises where
something is (`check_memory_pool`), and a check keeps its result until the boundary.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from typing import Any

import torch

from resilience.abft.seam import Handler, Original

__all__ = ["on_device"]


def on_device(handler: Handler, count_unprotected: Callable[[str], None]) -> Handler:
    """`handler` with the device of the first tensor made current, and passed over for what becomes a CUDA graph.

    Args:
        handler: of an override at the key CUDA.
        count_unprotected: told the reason of every operation that is passed over.
    """

    def handle(original: Original, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if torch.cuda.is_current_stream_capturing():
            count_unprotected("captured into a CUDA graph")
            return original(*args, **kwargs)
        index = _device_index(args, kwargs)
        if index is not None and _is_warm_up(index):
            count_unprotected("captured into a CUDA graph")
            return original(*args, **kwargs)
        if index is None or index == torch.cuda.current_device():
            return handler(original, args, kwargs)
        with torch.cuda.device(index):
            return handler(original, args, kwargs)

    return handle


def _is_warm_up(device_index: int) -> bool:
    """Whether this thread is on the stream on which inductor runs its graphs for the first time, and captures them."""
    trees = sys.modules.get("torch._inductor.cudagraph_trees")
    if trees is None:
        return False
    manager = trees.get_manager(device_index, create_if_none_exists=False)
    return manager is not None and torch.cuda.current_stream(device_index) == manager.stream


def _device_index(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    for argument in itertools.chain(args, kwargs.values()):
        if isinstance(argument, torch.Tensor) and argument.is_cuda:
            return argument.device.index
    return None
