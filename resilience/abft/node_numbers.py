"""Numbers of autograd's nodes, told apart where two threads count them.

Autograd numbers the nodes that a thread makes, in each thread from 0. A backward pass on a GPU runs in a thread of
autograd's own, and what is recomputed there (activation checkpointing) takes numbers that operations of the forward
pass have, too. The nodes of a recomputation are executed, if at all, by a pass that is nested in the one that
recomputes (reentrant checkpointing): by this both are told apart. Where they are not (a gradient of a gradient, several
GPUs in one process) an operation may be taken for another: its label is wrong, and its gradients are checked alone
unless they read the same operand.
"""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["NodeNumbers"]


class NodeNumbers:
    """Of the nodes of one process; one thread at a time executes the model."""

    def __init__(self) -> None:
        self._recomputing: set[int] = set()
        """Numbers of the backward passes under way within which operations have run forward."""

    def made(self) -> int:
        """Of the node that belongs to the operation that runs forward: autograd makes it before it calls the kernel."""
        number = torch._C._autograd._get_sequence_nr() - 1
        graph_task = torch._C._current_graph_task_id()
        if graph_task == -1:
            self._recomputing.clear()  # a pass that raised has not said that it ended
            return number
        if graph_task not in self._recomputing:
            self._recomputing.add(graph_task)
            engine = torch.autograd.Variable._execution_engine
            engine.queue_callback(lambda: self._recomputing.discard(graph_task))
        return _recomputed(number)

    def executed(self, node: Any) -> tuple[int, int]:
        """The two that a node may have that backward executes, the likelier one first."""
        number, graph_task = node._sequence_nr(), torch._C._current_graph_task_id()
        # Passes have rising numbers: one above that of a pass that has not ended was begun within it.
        is_nested = any(outer < graph_task for outer in self._recomputing)
        return (_recomputed(number), number) if is_nested else (number, _recomputed(number))


def _recomputed(number: int) -> int:
    return -2 - number  # −1 is no node's
