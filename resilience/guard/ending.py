"""With which code this process ends by itself, left where its agent reads it. Never here: what is done about it.

While the interpreter shuts down, gloo's worker threads (torch 2.13) may still release tensors. They need the GIL for
that, `Py_FinalizeEx` ends a thread that asks for it, and the process aborts: SIGABRT after a script that ended well,
or in the place of a code that the guard left with. So the code is noted before the shutdown begins.

Python keeps the code to itself. An exception passes `sys.excepthook`; `sys.exit`, `exit` and `quit` are wrapped here. A
bare `raise SystemExit` passes neither, and its code must not be taken for 0: whether the script ran to its end is read
from the frame of its module, whose last instruction is a return then, and the code is unknown otherwise.
"""

from __future__ import annotations

import atexit
import builtins
import dis
import functools
import inspect
import os
import sys
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

__all__ = ["Ending", "code_of"]


def code_of(status: object) -> int:
    """The exit code of `sys.exit(status)`."""
    if status is None:
        return 0
    return status & 0xFF if isinstance(status, int) else 1


class Ending:
    """Watches how this process ends; at the end tells `leave` the code (None where it is unknown) and why."""

    def __init__(self, leave: Callable[[int | None, str], None]) -> None:
        self._leave = leave
        self._pid = os.getpid()
        self._error = ""
        self._asked: int | None = None

    def watch(self) -> None:
        """Put the hooks in place; they stay until the process ends. Call it below the main script's own code."""
        self._script = _main_frame()
        self._hook = sys.excepthook
        sys.excepthook = self._remember
        for place, name in ((sys, "exit"), (builtins, "exit"), (builtins, "quit")):
            if hasattr(place, name):  # the last two are missing under `python -S`
                setattr(place, name, self._noting(getattr(place, name)))
        atexit.register(self._end)

    def _remember(self, kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        self._error = f"{kind.__name__}: {error}"
        self._hook(kind, error, traceback)

    def _noting(self, leave: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(leave, updated=())
        def noted(status: Any = None, /) -> Any:
            if threading.current_thread() is threading.main_thread():  # elsewhere it ends a thread only
                self._asked = code_of(status)
            return leave(status)

        return noted

    def _end(self) -> None:
        if os.getpid() != self._pid:
            return  # a fork of this process, whose end is not the rank's
        if self._error:
            self._leave(1, self._error)
        elif _has_returned(self._script):
            self._leave(0, "the script ended")
        else:
            self._leave(self._asked, "the script ended")


def _main_frame() -> FrameType | None:
    frame = inspect.currentframe()
    main = vars(sys.modules["__main__"])
    while frame is not None and not (frame.f_code.co_name == "<module>" and frame.f_globals is main):
        frame = frame.f_back
    return frame


def _has_returned(frame: FrameType | None) -> bool:
    return frame is not None and dis.opname[frame.f_code.co_code[frame.f_lasti]].startswith("RETURN_")
