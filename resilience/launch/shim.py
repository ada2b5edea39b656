"""Executed as a file (`python -I -S shim.py …`) in front of another program: prepares this process and becomes it.

    shim.py exec PARENT_PID SIGNAL COMMAND…     a process that gets SIGNAL when its parent dies
    shim.py rank PARENT_PID SIGNAL PLAN         the same, as the rank LOCAL_RANK of the plan (see ranks.py)

It imports a few modules of the standard library and nothing of this package, so that it costs a rank some milliseconds.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from typing import Any, NoReturn

__all__ = ["main"]

_PR_SET_PDEATHSIG = 1
_USAGE = 64


def main(arguments: list[str]) -> NoReturn:
    """Prepare and execute; returns only by exiting."""
    kind, parent_pid, signal_number, *rest = arguments
    _die_with_parent(int(parent_pid), int(signal_number))
    command = rest if kind == "exec" else _prepare_rank(rest[0])
    try:
        os.execvp(command[0], command)
    except OSError as error:
        sys.exit(_complain(f"{command[0]}: cannot be executed ({error.strerror}); check the path and its permissions"))


def _die_with_parent(parent_pid: int, signal_number: int) -> None:
    """Have the kernel send the signal when the parent dies, and end here if it is dead already."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal_number, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent_pid:
        sys.exit(_complain(f"process {parent_pid}, which started this one, is gone"))


def _prepare_rank(plan_path: str) -> list[str]:
    """Set this rank's environment and its log as the plan says; its command."""
    with open(plan_path, encoding="utf-8") as file:
        rank: dict[str, Any] = json.load(file)["ranks"][int(os.environ["LOCAL_RANK"])]
    os.environ.update(rank["environment"])
    if rank["log"] is not None:
        descriptor = os.open(rank["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.close(descriptor)
    command: list[str] = rank["command"]
    return command


def _complain(message: str) -> int:
    print(f"resilience: {message}", file=sys.stderr)
    return _USAGE


if __name__ == "__main__":
    main(sys.argv[1:])
