"""The dispatcher seam: our function in front of a kernel of aten, below autograd. Reversible, gated by thread, nothing
else.

An override is registered at one backend key with `torch.library`. Forward, backward, both kinds of activation
checkpointing, einsum, MultiheadAttention and ZeRO-3's own autograd Functions all arrive here. Outside of gated work,
and for everything that a handler itself calls, an override is one attribute test in front of the kernel that was there
before.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["Gate", "Handler", "Original", "Seam"]

Original = Callable[..., Any]
"""Calls the kernel that was there before, with the same arguments as the operator."""

Handler = Callable[[Original, tuple[Any, ...], dict[str, Any]], Any]
"""`handler(original, args, kwargs)` returns what the operator is to return."""


class _ThreadState(threading.local):
    open = False
    busy = False


class Gate:
    """Whether the current thread does the work that is protected.

    CPU backward runs in the thread that called it. CUDA backward runs on autograd's own threads, one a device: those
    count as open while any thread has the gate open and they execute a backward graph. A backward pass that was
    admitted by its number is let through in whatever thread, until it ends.
    """

    def __init__(self) -> None:
        self._thread = _ThreadState()
        self._num_open = 0
        self._admitted = -1
        self._lock = threading.Lock()

    def is_open(self, key: str) -> bool:
        if self._thread.open:
            return True
        on_cuda = key.endswith("CUDA")  # SparseCUDA and SparseCsrCUDA, too
        if self._thread.busy or not (self._admitted != -1 or (on_cuda and self._num_open)):
            return False
        task = torch._C._current_graph_task_id()
        if task == -1:
            return False
        # Passes have rising numbers: one above that of a pass that has not ended was begun within it.
        return task == self._admitted or task > self._admitted > -1 or (on_cuda and self._num_open > 0)

    def admit(self, graph_task: int) -> None:
        """Let this backward pass through, and those nested in it (reentrant checkpointing), instead of one before.

        Called inside the pass; it is let through until it ends.
        """
        self._admitted = graph_task
        engine = torch.autograd.Variable._execution_engine
        engine.queue_callback(lambda: self._dismiss(graph_task))

    def _dismiss(self, graph_task: int) -> None:
        if self._admitted == graph_task:
            self._admitted = -1

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Open the gate for this thread; may be nested."""
        before = self._thread.open
        with self._lock:
            self._num_open += 1
        self._thread.open = True
        try:
            yield
        finally:
            self._thread.open = before
            with self._lock:
                self._num_open -= 1

    @contextmanager
    def shut(self) -> Iterator[None]:
        """Shut the gate for this thread, in the middle of gated work."""
        thread = self._thread
        before = thread.open, thread.busy
        thread.open, thread.busy = False, True
        try:
            yield
        finally:
            thread.open, thread.busy = before

    def run_shut(self, handler: Handler, original: Original, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a handler; what it calls in turn is not protected again."""
        thread = self._thread
        before = thread.open
        thread.open = False
        thread.busy = True
        try:
            return handler(original, args, kwargs)
        finally:
            thread.busy = False
            thread.open = before


class Seam:
    """A set of overrides that are installed and removed together.

    Args:
        gate: which threads they are for.
        on_cuda: put around every handler at the key CUDA.
    """

    def __init__(self, gate: Gate, *, on_cuda: Callable[[Handler], Handler] = lambda handler: handler) -> None:
        self._gate = gate
        self._on_cuda = on_cuda
        self._library: Any = None
        self._handlers: dict[tuple[str, str], Handler] = {}

    def add(
        self, operator: str, handler: Handler, *, keys: tuple[str, ...] = ("CPU", "CUDA"), inherited: bool = False
    ) -> None:
        """Put `handler` in front of `aten::<operator>` at those backend keys of `keys` that have a kernel for it.

        With `inherited`, also where the kernel is one for all backends.
        """
        assert self._library is None, "add overrides before install"
        name = f"aten::{operator}"
        for key in keys:
            if torch._C._dispatch_has_kernel_for_dispatch_key(name, key) or (
                inherited and torch._C._dispatch_has_computed_kernel_for_dispatch_key(name, key)
            ):
                self._handlers[operator, key] = self._on_cuda(handler) if key == "CUDA" else handler

    @property
    def operators(self) -> tuple[tuple[str, str], ...]:
        """(operator, backend key) of every override."""
        return tuple(self._handlers)

    def install(self) -> None:
        """Register all overrides. A second call does nothing."""
        if self._library is not None:
            return
        self._library = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]  # torch has no annotation
        with warnings.catch_warnings():
            # Replacing a kernel is the purpose here; torch says so on every registration.
            warnings.filterwarnings(
                "ignore", message="(?s).*Overriding a previously registered kernel", category=UserWarning
            )
            for (operator, key), handler in self._handlers.items():
                self._library.impl(operator, self._override(operator, key, handler), key, with_keyset=True)

    def uninstall(self) -> None:
        """Put the kernels back that were there before. A second call does nothing."""
        if self._library is not None:
            self._library._destroy()
            self._library = None

    def _override(self, operator: str, key: str, handler: Handler) -> Callable[..., Any]:
        kernel = torch.library.get_kernel(f"aten::{operator}", key)
        call = kernel.call_boxed
        gate = self._gate

        def override(keyset: Any, *args: Any, **kwargs: Any) -> Any:
            if not gate.is_open(key):
                return call(keyset, *args, **kwargs)

            def original(*again: Any, **keywords: Any) -> Any:
                return call(keyset, *again, **keywords)

            return gate.run_shut(handler, original, args, kwargs)

        return override
