"""Records the micro-steps of one optimizer step as a sequence of forward and backward passes that can be run again.

What is recorded is what decides the result: inputs, generator states, buffers that the forward mutates, the engine's
position, modes of torch and of the modules, and the cotangents that the script sent to the engine's outputs. Weights
are not recorded: they do not change within a step. Never here: decisions, communication.
"""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch

from resilience.deepspeed.adapter import EngineAdapter, Position
from resilience.guard.buffers import BufferWatch
from resilience.guard.fingerprint import fingerprint
from resilience.guard.rng import RngSnapshot, capture_rng, restore_rng
from resilience.guard.values import KeptTensor, Unrecordable, differentiable, keep, take, tap, unchanged

__all__ = ["BackwardEvent", "ForwardEvent", "Recorder"]


@dataclasses.dataclass(slots=True)
class _Held:
    """A tensor that the script holds, if it still does."""

    reference: weakref.ref[torch.Tensor]
    version: int
    divisor: float = 1.0
    """It is the output divided by this."""

    @classmethod
    def of(cls, tensor: torch.Tensor, divisor: float = 1.0) -> _Held:
        return cls(weakref.ref(tensor), tensor._version, divisor)

    def overwrite(self, output: torch.Tensor) -> None:
        """Give it the value of the replayed output, unless the script has changed it in place since."""
        held = self.reference()
        if held is not None and held._version == self.version:
            held.detach().copy_(output / self.divisor)
            self.version = held._version


class _Output:
    """The value of an output until its cotangent has come. Only the hook that waits for it holds this, and dies with
    the script's graph: logits that the script has dropped take no memory through the backward pass.

    Args:
        value: shares its memory and version with what the script got.
        changed: called where the hook dies because the script wrote into the output: its cotangent will not come.
    """

    def __init__(self, value: torch.Tensor, changed: Callable[[], None]) -> None:
        self._value: torch.Tensor | None = value
        self._version = value._version
        self._changed = changed

    def take(self) -> torch.Tensor | None:
        """The value; None from the second time on."""
        value, self._value = self._value, None
        return value

    def __del__(self) -> None:
        if self._value is not None and self._value._version != self._version:
            self._changed()


@dataclasses.dataclass(slots=True)
class ForwardEvent:
    """One training forward of the engine."""

    index: int
    """Its place among the forwards of the step."""
    micro_step: int
    position: Position
    args: Any
    kwargs: Any
    rng: RngSnapshot
    buffers: dict[str, torch.Tensor]
    training: tuple[bool, ...]
    autocast: tuple[bool, torch.dtype, bool]
    pending: list[bool] = dataclasses.field(default_factory=list)
    """Whether the cotangent of each differentiable output may still come."""
    waiting: list[weakref.ref[_Output]] = dataclasses.field(default_factory=list)
    """Their values, as long as the script has a graph to them."""
    handed_out: list[_Held] = dataclasses.field(default_factory=list)
    """What the script got in their place, in their order."""
    returned_losses: list[tuple[int, _Held]] = dataclasses.field(default_factory=list)
    """What `engine.backward` returned for an output: (place of the output, tensor)."""
    graph_task: int | None = None
    """The backward pass that its outputs were sent to."""

    def expect_no_more(self) -> None:
        """No cotangent is expected any more: a graph that the script keeps must not keep the outputs' values."""
        self.pending = [False] * len(self.pending)
        for output in (reference() for reference in self.waiting):
            if output is not None:
                output.take()
        self.waiting.clear()

    @property
    def can_be_forgotten(self) -> bool:
        """Whether it leaves nothing behind: in evaluation mode, without a backward pass, and none can come any more."""
        return (
            not self.training[0]
            and self.graph_task is None
            and all(held.reference() is None for held in self.handed_out)
        )


@dataclasses.dataclass(slots=True)
class BackwardEvent:
    """One backward pass, which may begin at outputs of several forwards."""

    graph_task: int
    micro_step: int
    position: Position
    rng: RngSnapshot
    through_engine: bool
    cotangents: list[tuple[int, int, KeptTensor, torch.Tensor | None]] = dataclasses.field(default_factory=list)
    """(forward, place of the output, cotangent, fingerprint of the output unless it is a scalar)."""


class Recorder:
    """The record of the step that is being worked on.

    Args:
        adapter: the engine.
        enabled: record what a second run needs; without it only micro-steps are counted.
    """

    def __init__(self, adapter: EngineAdapter, *, enabled: bool = True) -> None:
        self._adapter = adapter
        self._enabled = enabled
        self._device_type = next((p.device.type for p in adapter.module.parameters()), "cpu")
        self._buffers = BufferWatch(adapter.module)
        self.copy_inputs = False
        """Whether inputs are copied, however large: the script writes into the tensors that it passes."""
        self._window = 0
        self.events: list[ForwardEvent | BackwardEvent] = []
        self.on_backward: Callable[[int], None] = lambda graph_task: None
        """Called inside a backward pass that begins, with its number; set by the transaction."""
        self.on_replayed: Callable[[ForwardEvent, list[torch.Tensor]], None] = lambda event, outputs: None
        """Called with a forward and what a replay made of it; set by the transaction."""
        self.clear()

    def clear(self) -> None:
        """Begin a new step: forget the last one's record."""
        self._window += 1
        for event in self._forwards():
            event.expect_no_more()
        self.events = []
        self.num_backwards = 0
        self._num_forwards = 0
        self.unavailable = ""
        self.last_loss: torch.Tensor | None = None

    @property
    def micro_step(self) -> int:
        """The micro-step that is being worked on, from 0: how many backward passes have begun."""
        return self.num_backwards

    def why_unavailable(self) -> str:
        """Why the step cannot be run again, in words; empty where it can. Asked at the boundary."""
        if not self._enabled:
            return "recording is off (guard.replay = false)"
        if self.unavailable:
            return self.unavailable
        if not self.num_backwards:
            return "no backward pass of the engine was seen in this step"
        for forward in self._forwards():
            if not (unchanged(forward.args) and unchanged(forward.kwargs)):
                # From the next step on each input is copied before the forward.
                self.copy_inputs = True
                return "an input was changed in place after its forward began"
        for event in self.events:
            if isinstance(event, BackwardEvent) and not all(kept.is_unchanged() for _, _, kept, _ in event.cotangents):
                return "a gradient of an output was changed in place after its backward pass began"
        return ""

    def before_forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ForwardEvent:
        """Record what decides a forward, just before it runs."""
        self._let_go()
        event = ForwardEvent(
            index=self._num_forwards,
            micro_step=self.micro_step,
            position=self._adapter.position(),
            args=(),
            kwargs={},
            rng=capture_rng(self._adapter),
            buffers=self._buffers.capture() if self._enabled else {},
            training=tuple(module.training for module in self._adapter.module.modules()),
            autocast=_autocast_state(self._device_type),
        )
        if self._enabled and not self.unavailable:
            try:
                event.args = keep(args, copy=self.copy_inputs)
                event.kwargs = keep(kwargs, copy=self.copy_inputs)
            except Unrecordable as error:
                self.unavailable = str(error)
        self._num_forwards += 1
        self.events.append(event)
        return event

    def forget(self, event: ForwardEvent) -> None:
        """The forward raised: it has no part in the step."""
        self.events.remove(event)

    def after_forward(self, event: ForwardEvent, outputs: Any) -> Any:
        """Tap the outputs of the forward that `event` began; returns what the script gets."""
        problem = self._buffers.changed_unseen() if self._enabled else ""
        if problem:
            self.unavailable = self.unavailable or problem
        window = self._window

        def changed() -> None:
            if window == self._window:
                self.unavailable = self.unavailable or "the script changed an output of the model in place"

        def hand_out(place: int, output: torch.Tensor) -> torch.Tensor:
            event.pending.append(True)
            waiting = _Output(output.detach(), changed)
            event.waiting.append(weakref.ref(waiting))
            # A scalar may be changed in place by the script, which a view of a module's output would not survive.
            handed = output.clone() if output.dim() == 0 else output.view_as(output)
            tapped: Any = handed  # torch leaves register_hook untyped
            # By number: a graph that the script keeps must not keep the inputs of a step that is over.
            index = event.index
            tapped.register_hook(lambda cotangent: self._on_cotangent(window, index, place, waiting, cotangent))
            event.handed_out.append(_Held.of(handed))
            return handed

        return tap(outputs, hand_out)

    def after_backward(self, loss: Any, returned: Any, divisor: float) -> None:
        """Remember what `engine.backward(loss)` returned, so that a replay can correct its value."""
        if not isinstance(returned, torch.Tensor):
            return
        for forward in reversed(self._forwards()):
            for place, handed in enumerate(forward.handed_out):
                if handed.reference() is loss:
                    forward.returned_losses.append((place, _Held.of(returned, divisor)))
                    return

    def _on_cotangent(self, window: int, index: int, place: int, waiting: _Output, cotangent: torch.Tensor) -> None:
        """Runs inside a backward pass, before any of DeepSpeed's own hooks."""
        output = waiting.take()
        forward = next((forward for forward in reversed(self._forwards()) if forward.index == index), None)
        if window != self._window or forward is None:
            self.unavailable = self.unavailable or "a backward pass belongs to an earlier step or a forgotten forward"
            return
        task = torch._C._current_graph_task_id()
        event = self.events[-1] if self.events else None
        if not isinstance(event, BackwardEvent) or event.graph_task != task:
            event = self._begin_backward(task)
        is_pending, forward.pending[place] = forward.pending[place], False
        if output is None or not is_pending or forward.graph_task not in (None, task):
            self.unavailable = self.unavailable or "outputs of one forward were sent backward twice (retain_graph)"
            return
        forward.graph_task = task
        if output.dim() == 0:
            self.last_loss = output
        if not self._enabled:
            return
        mark = fingerprint(output) if output.dim() else None
        kept = KeptTensor(cotangent.detach(), cotangent._version)
        if cotangent.dim() == 0:
            kept = KeptTensor(cotangent.detach().clone(), None)
        event.cotangents.append((forward.index, place, kept, mark))

    def _begin_backward(self, task: int) -> BackwardEvent:
        self.on_backward(task)
        event = BackwardEvent(
            graph_task=task,
            micro_step=self.micro_step,
            position=self._adapter.position(),
            rng=capture_rng(self._adapter),
            through_engine=self._adapter.in_engine_backward,
        )
        if self._adapter.coalesces_reduction:
            self.unavailable = self.unavailable or "the script is inside engine.coalesce_grad_reduction()"
        self.events.append(event)
        self.num_backwards += 1
        return event

    def _forwards(self) -> list[ForwardEvent]:
        return [event for event in self.events if isinstance(event, ForwardEvent)]

    def _let_go(self) -> None:
        """A new forward begins: no cotangent is expected for the outputs of one that went through its backward pass."""
        for event in self._forwards():
            if event.graph_task is not None:
                event.expect_no_more()
        last = self.events[-1] if self.events else None
        if isinstance(last, ForwardEvent) and last.can_be_forgotten:
            self.events.pop()

    @contextlib.contextmanager
    def revisiting(self, events: list[ForwardEvent | BackwardEvent]) -> Iterator[None]:
        """The record is that of an earlier step, until the end of the block."""
        now = self.events, self.num_backwards, self._num_forwards, self.unavailable, self.last_loss
        self.events, self.unavailable = events, ""
        self.num_backwards = sum(isinstance(event, BackwardEvent) for event in events)
        try:
            yield
        finally:
            self.events, self.num_backwards, self._num_forwards, self.unavailable, self.last_loss = now

    def restore_buffers(self) -> None:
        """Give the buffers back what they held before the first forward of the record."""
        first = next(iter(self._forwards()), None)
        if first is not None:
            self._buffers.restore(first.buffers)

    def run_forward(self, event: ForwardEvent, *, anew: bool = False) -> list[torch.Tensor]:
        """Run a recorded forward again; returns its differentiable outputs.

        Args:
            event: the forward.
            anew: from the buffers as they are now, which the record takes over: those that it holds were mutated by
                forwards that went before it with other weights.
        """
        restore_rng(event.rng, self._adapter)
        self._adapter.move_to(event.position)
        if anew:
            event.buffers = self._buffers.capture()
        else:
            self._buffers.restore(event.buffers)
        enabled, dtype, cache = event.autocast
        with (
            self._adapter.training_flags(event.training),
            torch.enable_grad(),
            torch.autocast(self._device_type, dtype=dtype, enabled=enabled, cache_enabled=cache),
        ):
            return differentiable(self._adapter.forward(*take(event.args), **take(event.kwargs)))

    def run_backward(self, event: BackwardEvent, outputs: dict[int, list[torch.Tensor]]) -> torch.Tensor | None:
        """Run a recorded backward pass again from the outputs of the replayed forwards.

        Returns:
            A 0-d bool tensor: whether some output that is no scalar differs from the recorded one, in which case the
            recorded cotangents do not belong to it; None where all outputs are scalars.
        """
        restore_rng(event.rng, self._adapter)
        self._adapter.move_to(event.position)
        roots = [outputs[forward][place] for forward, place, _, _ in event.cotangents]
        for root in roots:
            if root.dim() == 0:
                self.last_loss = root.detach()
        differs = [
            fingerprint(root) != mark
            for root, (_, _, _, mark) in zip(roots, event.cotangents, strict=True)
            if mark is not None
        ]
        self._adapter.run_backward(
            roots, [take(kept) for _, _, kept, _ in event.cotangents], through_engine=event.through_engine
        )
        return torch.stack(differs).any() if differs else None

    @torch.no_grad()
    def overwrite(self, event: ForwardEvent, outputs: list[torch.Tensor]) -> None:
        """Give the tensors that the script already holds the values of the replayed `outputs`, in place."""
        for held, output in zip(event.handed_out, outputs, strict=True):
            held.overwrite(output.detach())
        for place, held in event.returned_losses:
            held.overwrite(outputs[place].detach())
        self.on_replayed(event, outputs)


def _autocast_state(device_type: str) -> tuple[bool, torch.dtype, bool]:
    return (
        torch.is_autocast_enabled(device_type),
        torch.get_autocast_dtype(device_type),
        torch.is_autocast_cache_enabled(),
    )
