"""An engine that stands still while its script is led past steps of a snapshot: what it counts, what it refuses.

Written against DeepSpeed 0.19.8 (`versions.py`), like `adapter.py`. Everything is reversible. Never here: the recorded
trail, decisions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NoReturn

import torch
import torch.utils.hooks

__all__ = ["EngineLead", "wrap_module_forward"]

_SUPPRESSED = ("save_checkpoint", "save_16bit_model", "save_fp16_model")
"""Saves that write what was written already, the first time that these steps were taken."""
_REFUSED = {
    "load_checkpoint": "loads a checkpoint",
    "_zero3_consolidated_16bit_state_dict": "gathers the weights",
    "_consolidated_16bit_state_dict": "gathers the weights",
}


class EngineLead:
    """Stands in for one engine's step; between `begin` and `end` its weights are not those that the script expects.

    Args:
        engine: a `DeepSpeedEngine`.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._leading = False
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._refuse: Callable[[str], NoReturn] | None = None
        self._before: dict[str, Any] = {}

    def install(self) -> None:
        """Wrap what saves and loads, outside of whatever else wraps it."""
        engine = self._engine
        self._before = {name: engine.__dict__.get(name) for name in (*_SUPPRESSED, *_REFUSED)}
        for name in _SUPPRESSED:
            engine.__dict__[name] = self._suppressing(getattr(engine, name))
        for name, what in _REFUSED.items():
            engine.__dict__[name] = self._refusing(getattr(engine, name), what)

    def uninstall(self) -> None:
        """Put the engine back as it was."""
        self.end()
        for name, before in self._before.items():
            if before is None:
                self._engine.__dict__.pop(name, None)
            else:
                self._engine.__dict__[name] = before

    @property
    def can_lead(self) -> bool:
        """Whether the script calls forward, backward and step of this engine by itself."""
        return type(self._engine).__name__ == "DeepSpeedEngine"

    @property
    def grad_norm(self) -> Any:
        """What `engine.get_global_grad_norm()` says: None, a number, or a tensor of one element."""
        return self._engine.get_global_grad_norm()

    def begin(self, refuse: Callable[[str], NoReturn]) -> None:
        """From now on the engine stands still, and what would need its weights is refused."""
        self._leading, self._refuse = True, refuse
        for module in self._engine.module.modules():
            self._hooks.append(module.register_state_dict_pre_hook(self._on_state_dict))
        for parameter in self._engine.module.parameters():
            if parameter.requires_grad:
                self._hooks.append(parameter.register_hook(self._on_gradient))

    def end(self) -> None:
        """The engine is itself again."""
        self._leading = False
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def backward(self, loss: torch.Tensor, *, scaled: bool) -> torch.Tensor:
        """What `engine.backward` returns, and counts."""
        engine = self._engine
        if not engine.managed_gradient_accumulation():
            engine._unmanaged_backward_count += 1
        return loss / engine.gradient_accumulation_steps() if scaled else loss

    def ends_step(self) -> bool:
        """Whether the `engine.step()` that is about to be taken is an optimizer step."""
        engine = self._engine
        engine._running_engine_step = True
        is_boundary = bool(engine.is_gradient_accumulation_boundary())
        engine._running_engine_step = False
        return is_boundary

    def micro_step(self) -> None:
        """What `engine.step()` does anywhere but at a boundary."""
        self._engine._step_applied = False
        self._engine.micro_steps += 1

    def optimizer_step(self, lr_kwargs: Any, *, applied: bool, grad_norm: Any) -> None:
        """What `engine.step()` counts at a boundary; the scheduler is stepped, the optimizer is not.

        Args:
            lr_kwargs: as the script gave them.
            applied: whether DeepSpeed took the step, and did not skip it.
            grad_norm: for `engine.get_global_grad_norm()`.
        """
        engine = self._engine
        engine._step_applied = applied
        engine._global_grad_norm = grad_norm
        if hasattr(engine.optimizer, "overflow"):
            engine.optimizer.overflow = not applied  # Accelerate asks the optimizer whether a step was skipped
        if not applied:
            engine.skipped_steps += 1
        elif engine.lr_scheduler is not None:
            self._step_scheduler(lr_kwargs)
        engine.losses = None
        engine.global_steps += 1
        if engine.managed_gradient_accumulation():
            engine.global_samples += engine.train_batch_size()
        else:
            num_samples = engine.train_batch_size() // engine.gradient_accumulation_steps()
            engine.global_samples += num_samples * engine._unmanaged_backward_count
            engine._unmanaged_backward_count = 0
        engine.micro_steps += 1

    def _step_scheduler(self, lr_kwargs: Any) -> None:
        scheduler = self._engine.lr_scheduler
        try:
            scheduler.step(**(lr_kwargs or {}))
        except TypeError:
            # As DeepSpeed does, for Megatron's schedulers.
            scheduler.step(self._engine.train_batch_size())

    def _suppressing(self, save: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(save)
        def suppressed(*args: Any, **kwargs: Any) -> Any:
            return True if self._leading else save(*args, **kwargs)

        return suppressed

    def _refusing(self, function: Callable[..., Any], what: str) -> Callable[..., Any]:
        @functools.wraps(function)
        def refused(*args: Any, **kwargs: Any) -> Any:
            if self._leading:
                self._refuse_to(what)
            return function(*args, **kwargs)

        return refused

    def _on_state_dict(self, *_: Any) -> None:
        self._refuse_to("reads the model's weights (state_dict)")

    def _on_gradient(self, _: torch.Tensor) -> None:
        self._refuse_to("computes a loss from the model's parameters, past the engine")

    def _refuse_to(self, what: str) -> NoReturn:
        assert self._refuse is not None
        self._refuse(f"the script {what} between step {self._engine.global_steps} and the next")


def wrap_module_forward(
    module: torch.nn.Module, called: Callable[[Callable[..., Any], Any, Any], Any]
) -> Callable[[], None]:
    """Have `called(forward, args, kwargs)` answer in the place of `module.forward`.

    Returns:
        What takes the wrapper off again.
    """
    forward, before = module.forward, module.__dict__.get("forward")

    @functools.wraps(forward)  # libraries read its signature
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return called(forward, args, kwargs)

    module.__dict__["forward"] = wrapper

    def unwrap() -> None:
        if module.__dict__.get("forward") is wrapper:
            del module.__dict__["forward"]
            if before is not None:
                module.__dict__["forward"] = before

    return unwrap
