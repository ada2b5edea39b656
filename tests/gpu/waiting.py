"""No host that waits for its device, held by torch itself."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["no_waiting"]


@contextmanager
def no_waiting() -> Iterator[None]:
    """Whatever makes the host wait for the device within raises."""
    torch.cuda.synchronize()
    try:
        with warnings.catch_warnings():
            # torch says once that this mode is a prototype: after it has set it, and here a warning is an error.
            warnings.filterwarnings("ignore", message="Synchronization debug mode", category=UserWarning)
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
