"""The one view that the guard has of a DeepSpeed engine: what to wrap, what to read, how to run a backward pass again.

Written against DeepSpeed 0.19.8 (`versions.py`). Everything here is reversible: `wrap` puts the engine back as it was.
Never here: decisions, records of a step, communication of our own.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from deepspeed.runtime.activation_checkpointing import checkpointing
from deepspeed.runtime.base_optimizer import ZeROOptimizer

from resilience.deepspeed.discard import discard_gradients, keep_gradients

__all__ = ["EngineAdapter", "Position", "RngStates"]

RngStates = dict[str, torch.Tensor]


@dataclasses.dataclass(frozen=True, slots=True)
class Position:
    """Where an engine is within an optimizer step: the counters and flags that decide what a backward pass does."""

    micro_steps: int
    boundary: bool | None
    in_no_sync: bool
    num_unmanaged_backwards: int
    in_step: bool


class EngineAdapter:
    """Reads and drives one `DeepSpeedEngine`.

    Args:
        engine: as `deepspeed.initialize` returned it, not wrapped yet.
    """

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.forward: Callable[..., Any] = engine.forward
        self.backward: Callable[..., Any] = engine.backward
        self.take_model_step: Callable[..., Any] = engine._take_model_step
        self.step: Callable[..., Any] = engine.step

    def wrap(
        self,
        *,
        forward: Callable[..., Any],
        backward: Callable[..., Any],
        take_model_step: Callable[..., Any],
        step: Callable[..., Any],
    ) -> Callable[[], None]:
        """Put wrappers in the place of the engine's own methods; the returned callable takes them out again."""
        wrappers = {"forward": forward, "backward": backward, "_take_model_step": take_model_step, "step": step}
        for name, wrapper in wrappers.items():
            # In the instance's dict, below nn.Module's bookkeeping: the class stays untouched.
            self.engine.__dict__[name] = wrapper

        def unwrap() -> None:
            for name, wrapper in wrappers.items():
                if self.engine.__dict__.get(name) is wrapper:
                    del self.engine.__dict__[name]

        return unwrap

    @property
    def module(self) -> torch.nn.Module:
        """The model, as DeepSpeed holds it."""
        module = self.engine.module
        assert isinstance(module, torch.nn.Module)
        return module

    @property
    def global_steps(self) -> int:
        """Optimizer steps taken or skipped so far."""
        return int(self.engine.global_steps)

    @property
    def step_was_applied(self) -> bool:
        """Whether the last optimizer step changed the weights; False where DeepSpeed skipped it."""
        return bool(self.engine.was_step_applied())

    @property
    def gradient_accumulation_steps(self) -> int:
        """Micro-batches of an optimizer step, as configured."""
        return int(self.engine.gradient_accumulation_steps())

    @property
    def in_engine_backward(self) -> bool:
        """Whether `engine.backward(loss)` is running, rather than a direct `loss.backward()`."""
        return bool(self.engine._running_engine_backward)

    @property
    def coalesces_reduction(self) -> bool:
        """Whether the script is inside `engine.coalesce_grad_reduction()`."""
        return bool(getattr(self.engine.optimizer, "_coalesce_grad_reduction", False))

    @property
    def loss_scale(self) -> float:
        """What the gradients that reach the parameters are multiplied with; 1 where nothing is scaled."""
        optimizer = self.engine.optimizer
        # engine.backward scales for the ZeRO wrappers only.
        if not self.engine.fp16_enabled() or not isinstance(optimizer, ZeROOptimizer):
            return 1.0
        return float(optimizer.loss_scale)

    @property
    def falling_scale(self) -> float | None:
        """The scale of a dynamic loss scaler that can go lower still: overflow may be its business. None elsewhere."""
        optimizer = self.engine.optimizer
        if not self.engine.fp16_enabled():
            return None
        scaler = getattr(optimizer, "loss_scaler", None)
        if scaler is not None:
            falls = getattr(scaler, "dynamic", False) and scaler.cur_scale > scaler.min_scale
            return float(scaler.cur_scale) if falls else None
        config = getattr(optimizer, "loss_scale_config", None)
        if config is None or not config.dynamic_loss_scale or config.cur_scale <= config.min_loss_scale:
            return None
        return float(config.cur_scale)

    def position(self) -> Position:
        """Where the engine is now."""
        engine = self.engine
        return Position(
            micro_steps=engine.micro_steps,
            boundary=engine._is_gradient_accumulation_boundary,
            in_no_sync=engine.inside_no_sync_ctxt,
            num_unmanaged_backwards=getattr(engine, "_unmanaged_backward_count", 0),
            in_step=engine._running_engine_step,
        )

    def move_to(self, position: Position) -> None:
        """Put the engine where it was when `position` was read."""
        engine = self.engine
        engine.micro_steps = position.micro_steps
        engine._is_gradient_accumulation_boundary = position.boundary
        engine.inside_no_sync_ctxt = position.in_no_sync
        engine._unmanaged_backward_count = position.num_unmanaged_backwards
        engine._running_engine_step = position.in_step
        if position.boundary is not None and hasattr(engine.optimizer, "set_gradient_accumulation_boundary"):
            engine.optimizer.set_gradient_accumulation_boundary(position.boundary)

    def discard_gradients(self) -> None:
        """Drop all gradients of this step, reduced or not."""
        discard_gradients(self.engine)

    def keep_gradients(self) -> Callable[[], None]:
        """Hold on to this step's gradients; the returned callable puts them back after a replay."""
        return keep_gradients(self.engine)

    def run_backward(
        self, outputs: Sequence[torch.Tensor], cotangents: Sequence[torch.Tensor], *, through_engine: bool
    ) -> None:
        """Run DeepSpeed's backward pass from `cotangents` at `outputs`, as the script's own call did.

        Args:
            outputs: outputs of `forward`, with a graph.
            cotangents: what reached them, each of its output's shape, before DeepSpeed's own hooks.
            through_engine: whether the script called `engine.backward`; else a direct `backward`.
        """
        if through_engine:
            # DeepSpeed's prologue, scaling and epilogue all run; the surrogate replaces what they would send down.
            surrogate = _Surrogate.apply(tuple(cotangents), *outputs)  # type: ignore[no-untyped-call]
            self.backward(surrogate, scale_wrt_gas=False)
        else:
            self.engine._manual_backward_expected = True
            torch.autograd.backward(list(outputs), list(cotangents))

    def hyperparameters(self) -> list[dict[str, Any]]:
        """A copy of everything that the optimizer's groups say, but the parameters: learning rates, betas, counters."""
        groups = self.engine.optimizer.param_groups
        return [{name: copy.deepcopy(value) for name, value in group.items() if name != "params"} for group in groups]

    def set_hyperparameters(self, groups: Sequence[dict[str, Any]]) -> None:
        """Give the optimizer's groups what `hyperparameters` returned."""
        for group, values in zip(self.engine.optimizer.param_groups, groups, strict=True):
            group.update(copy.deepcopy(values))

    def finish_window(self) -> None:
        """What `step()` does before the optimizer where the caller owns the boundary."""
        engine = self.engine
        if engine.managed_gradient_accumulation():
            return
        if engine.zero_optimization_partition_gradients():
            engine.optimizer.finalize_gradient_accumulation_boundary()
        elif engine.enable_backward_allreduce and not engine.inside_no_sync_ctxt:
            engine.allreduce_gradients()

    def rng_states(self) -> RngStates:
        """The generator states that DeepSpeed's activation checkpointing tracks by name."""
        return {name: state.clone() for name, state in checkpointing.get_cuda_rng_tracker().get_states().items()}

    def set_rng_states(self, states: RngStates) -> None:
        """Put back what `rng_states` returned."""
        if states:
            checkpointing.get_cuda_rng_tracker().set_states({name: state.clone() for name, state in states.items()})

    @contextlib.contextmanager
    def training_flags(self, flags: Sequence[bool]) -> Iterator[None]:
        """Give each module, in `module.modules()` order, its flag `training`; put them back at the end."""
        modules = list(self.module.modules())
        before = [module.training for module in modules]
        _set_training(modules, flags)
        try:
            yield
        finally:
            _set_training(modules, before)


def _set_training(modules: Sequence[torch.nn.Module], flags: Sequence[bool]) -> None:
    for module, flag in zip(modules, flags, strict=True):
        module.training = flag


class _Surrogate(torch.autograd.Function):
    """A scalar whose backward sends recorded cotangents to `outputs`, whatever reaches the scalar itself."""

    @staticmethod
    def forward(ctx: Any, cotangents: tuple[torch.Tensor, ...], *outputs: torch.Tensor) -> torch.Tensor:
        ctx.cotangents = cotangents
        return torch.zeros((), dtype=torch.float32, device=outputs[0].device)

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> Any:
        return (None, *ctx.cotangents)
