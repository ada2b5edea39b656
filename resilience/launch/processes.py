"""Process plumbing on Linux: parent-death signals, adoption of orphans, ending what is left of a tree.

Nothing here knows what a run is. A process is only ever ended when it descends from the caller.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from collections.abc import Collection

import psutil

__all__ = ["adopt_orphans", "die_with_parent", "end_descendants", "end_sessions", "is_alive"]

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def die_with_parent(signal_number: signal.Signals, *, parent_pid: int | None) -> bool:
    """Ask the kernel for `signal_number` when the parent of this process dies.

    Args:
        signal_number: what this process gets.
        parent_pid: the parent that it was started by, where that is known.

    Returns:
        False when that parent is gone already, so that the signal will never come.
    """
    _prctl(_PR_SET_PDEATHSIG, int(signal_number))
    return parent_pid is None or os.getppid() == parent_pid


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent dies, so that none of them is out of reach."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl({option}, {value}): {os.strerror(number)}")


def is_alive(pid: int) -> bool:
    """Whether there is a process with this pid that has not ended (a zombie has)."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def end_descendants(*, spare: Collection[int] = (), timeout_s: float = 5.0) -> int:
    """SIGKILL every descendant of this process but those in `spare` and their descendants; wait for their end.

    Returns:
        How many there were.
    """
    return _kill([p for p in _descendants() if not _belongs_to(p, spare)], timeout_s)


def end_sessions(session_ids: Collection[int], *, timeout_s: float = 5.0) -> int:
    """SIGKILL every descendant of this process that lives in one of these sessions; wait for their end."""
    return _kill([p for p in _descendants() if _session_id(p.pid) in session_ids], timeout_s)


def _descendants() -> list[psutil.Process]:
    return list(psutil.Process().children(recursive=True))


def _belongs_to(process: psutil.Process, pids: Collection[int]) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.pid in pids or any(parent.pid in pids for parent in process.parents())
    return False


def _session_id(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None


def _kill(processes: list[psutil.Process], timeout_s: float) -> int:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=timeout_s)
    return len(processes)
