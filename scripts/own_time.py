"""Seconds that protection spends in its own code, told apart at its borders from what it calls: the operations
themselves, and DeepSpeed's methods.

A ratio of two steps scatters with everything that happens on a machine; this share of one step does not. It leaves out
what is felt elsewhere (caches, memory) and what costs nothing to speak of (hooks that name modules). With several ranks
waiting for the others at the vote is in it. On a GPU it is the host's time only.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from resilience.abft.seam import Gate
from resilience.deepspeed.adapter import EngineAdapter
from resilience.guard.recorder import Recorder
from resilience.guard.reductions import Reductions
from resilience.guard.screens import GradientScreen
from resilience.guard.transaction import Guard

__all__ = ["OwnTime"]

_Function = Callable[..., Any]


class OwnTime:
    """A clock that runs in protection's code. One thread: on a CPU, autograd's backward runs in the caller's."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._is_own = False
        self._since = time.perf_counter()

    def watch(self) -> None:
        """Put the clock's switches at the borders, for the rest of the process; call it before anything is guarded."""
        for entered, names in (
            (Guard, ("_forward", "_backward", "_take_model_step", "_engine_step")),
            (GradientScreen, ("_read",)),
            (Recorder, ("_on_cotangent",)),
            (Reductions, ("goes_in", "comes_out")),
        ):
            for name in names:
                setattr(entered, name, self._switched(getattr(entered, name), is_own=True))
        self._watch_operations()
        self._watch_engine()

    def _switched(self, function: _Function, *, is_own: bool) -> _Function:
        def switched(*args: Any, **kwargs: Any) -> Any:
            before = self._switch(is_own)
            try:
                return function(*args, **kwargs)
            finally:
                self._switch(before)

        return switched

    def _switch(self, is_own: bool) -> bool:
        now, before = time.perf_counter(), self._is_own
        if before:
            self.seconds += now - self._since
        self._is_own, self._since = is_own, now
        return before

    def _watch_operations(self) -> None:
        run_shut = Gate.run_shut

        def run(gate: Gate, handler: _Function, original: _Function, args: Any, kwargs: Any) -> Any:
            return run_shut(gate, handler, self._switched(original, is_own=False), args, kwargs)

        Gate.run_shut = self._switched(run, is_own=True)  # type: ignore[method-assign]

    def _watch_engine(self) -> None:
        make = EngineAdapter.__init__

        def make_watched(adapter: EngineAdapter, engine: Any) -> None:
            make(adapter, engine)
            for name in ("forward", "backward", "take_model_step", "step"):
                setattr(adapter, name, self._switched(getattr(adapter, name), is_own=False))

        EngineAdapter.__init__ = make_watched  # type: ignore[method-assign]
