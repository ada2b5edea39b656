"""Runs the recorded step again, so that afterwards everything is as if the faulty execution had never been.

Gradients, generators, buffers, counters, and the tensors that the script already holds. Never here: the question
whether to do so.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch

from resilience.deepspeed.adapter import EngineAdapter, Position
from resilience.guard.recorder import BackwardEvent, ForwardEvent, Recorder
from resilience.guard.rng import RngSnapshot, capture_rng, restore_rng

__all__ = ["replay"]


def replay(
    adapter: EngineAdapter,
    recorder: Recorder,
    *,
    begin_micro_step: Callable[[int], None],
    begin_backward: Callable[[int], None],
    protected: Callable[[], AbstractContextManager[None]],
    boundary: tuple[Position, RngSnapshot] | None = None,
    anew: bool = False,
) -> bool:
    """Discard the gradients of the step and run its recorded micro-steps again.

    Called at the boundary, inside `engine.step()`. The engine, the generators and the buffers end where they were.

    Args:
        adapter: the engine.
        recorder: the record of the step.
        begin_micro_step: called with the number of each micro-step before its first forward.
        begin_backward: called with the number of its micro-step before each backward pass.
        protected: entered around each forward and backward.
        boundary: where engine and generators end; None for where they are now.
        anew: with other weights than those that the record was made with (`Recorder.run_forward`).

    Returns:
        Whether the recorded cotangents belong to the replayed outputs: False where an output that is no scalar did
        not replay bit-equal, in which case the gradients are worth nothing.
    """
    position, rng = boundary if boundary is not None else (adapter.position(), capture_rng(adapter))
    adapter.discard_gradients()
    outputs: dict[int, list[torch.Tensor]] = {}
    differences: list[torch.Tensor] = []
    micro_step = -1
    for event in recorder.events:
        if isinstance(event, ForwardEvent) and event.micro_step != micro_step:
            micro_step = event.micro_step
            begin_micro_step(micro_step)
        with protected():
            if isinstance(event, ForwardEvent):
                outputs[event.index] = recorder.run_forward(event, anew=anew)
                recorder.overwrite(event, outputs[event.index])
            else:
                begin_backward(event.micro_step)
                _backward(recorder, event, outputs, differences)
    adapter.move_to(position)
    adapter.finish_window()
    restore_rng(rng, adapter)
    return not (differences and bool(torch.stack(differences).any()))


def _backward(
    recorder: Recorder,
    event: BackwardEvent,
    outputs: dict[int, list[torch.Tensor]],
    differences: list[torch.Tensor],
) -> None:
    difference = recorder.run_backward(event, outputs)
    if difference is not None:
        differences.append(difference)
    for forward in {forward for forward, _, _, _ in event.cotangents}:
        # Their graphs are spent; what they hold is needed no more.
        outputs[forward] = []
