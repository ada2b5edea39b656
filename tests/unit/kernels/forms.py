"""Who does the arithmetic of a CPU kernel: torch, or the compiled module with one of its instruction sets."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

__all__ = ["FORMS", "choose", "restored"]

FORMS = ["torch", "plain", "avx2", "avx512"]


def choose(module: ModuleType, form: str, patch: pytest.MonkeyPatch) -> bool:
    """Have `form` do the arithmetic of `module` until `patch` is undone; whether this machine can."""
    if form == "torch":
        patch.setattr(module, "_compiled", None)
        return True
    return module._compiled is not None and module._compiled.use(form)


@contextlib.contextmanager
def restored(module: ModuleType) -> Iterator[None]:
    """The instruction set of `module`, and torch's threads, are afterwards what they were."""
    compiled, threads = module._compiled, torch.get_num_threads()
    best = compiled.instructions() if compiled is not None else None
    try:
        yield
    finally:
        if compiled is not None:
            compiled.use(best)
        torch.set_num_threads(threads)
