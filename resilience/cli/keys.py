"""Keys as they are pressed, without Enter, on a terminal; the terminal is given back as it was."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import termios
import tty
from collections.abc import Iterator
from typing import Any

__all__ = ["Keys", "pressed"]


class Keys:
    """What is pressed on standard input; nothing, if that is no terminal."""

    def __init__(self, descriptor: int | None) -> None:
        self._descriptor = descriptor
        self.ended = False
        """A signal asked this process to end."""

    def next(self, timeout_s: float) -> str:
        """The keys pressed within `timeout_s` seconds; empty for none. Returns at once when there are some."""
        if self._descriptor is None or self.ended:
            with contextlib.suppress(InterruptedError):
                select.select([], [], [], 0.0 if self.ended else timeout_s)
            return ""
        ready, _, _ = select.select([self._descriptor], [], [], timeout_s)
        if not ready:
            return ""
        found = os.read(self._descriptor, 64)
        self.ended = self.ended or not found  # the terminal was closed
        return found.decode(errors="replace")

    def end(self, *_: object) -> None:
        """End soon: the handler of signals."""
        self.ended = True


@contextlib.contextmanager
def pressed() -> Iterator[Keys]:
    """Keys one by one while the block runs; the terminal is restored whatever ends it, SIGTERM and SIGHUP included."""
    descriptor = sys.stdin.fileno() if sys.stdin.isatty() else None
    keys = Keys(descriptor)
    # Ctrl-Z would leave the shell on our screen, with a terminal that echoes nothing.
    handlers: dict[int, Any] = {signal.SIGTERM: keys.end, signal.SIGHUP: keys.end, signal.SIGTSTP: signal.SIG_IGN}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    settings = None if descriptor is None else termios.tcgetattr(descriptor)
    try:
        if descriptor is not None:
            tty.setcbreak(descriptor)
        yield keys
    finally:
        if descriptor is not None and settings is not None:
            with contextlib.suppress(termios.error):  # the terminal has gone
                termios.tcsetattr(descriptor, termios.TCSADRAIN, settings)
        for number, handler in before.items():
            signal.signal(number, handler)
