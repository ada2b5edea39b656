"""Protections of this process that a test installs, and which are removed after it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

from resilience.abft.handlers import Injector
from resilience.abft.protection import Protection
from resilience.clock import Clock
from resilience.config import DetectionConfig

__all__ = ["installing"]


@contextlib.contextmanager
def installing() -> Iterator[Callable[..., Protection]]:
    """Gives a function that makes an installed protection of `[detection]` settings; injector and clock if given."""
    made: list[Protection] = []

    def make(settings: Mapping[str, object], injector: Injector | None, clock: Clock | None = None) -> Protection:
        protection = Protection(DetectionConfig.model_validate(settings), injector=injector, clock=clock)
        protection.install()
        made.append(protection)
        return protection

    try:
        yield make
    finally:
        for protection in reversed(made):
            protection.uninstall()
