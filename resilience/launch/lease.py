"""The launcher's lease: a file in the run directory that the launcher renews while it lives.

Agents that are not the launcher's own children (started over ssh, or by another node's runner) watch it and end their
ranks when it is gone or no longer renewed. It is a file, not a message to the coordinator, so that a dead launcher and
a silent coordinator cannot be taken for each other (docs/adr/0002-launcher-lease.md). It holds nothing secret.
"""

from __future__ import annotations

import json
import os
import socket
import threading
from pathlib import Path

import pydantic

from resilience.clock import Clock, SystemClock
from resilience.launch.processes import is_alive

__all__ = ["Holder", "Lease", "LeaseWatch"]

FILE_NAME = "launcher.lease"
RENEWALS_PER_LEASE = 5
_LOOK_INTERVAL_S = 0.5
"""The file may lie on a network file system: it is not read more often than this."""


class Holder(pydantic.BaseModel):
    """Who holds the lease; `count` grows with every renewal."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    host: str
    pid: int
    count: int

    @classmethod
    def read(cls, run_dir: Path) -> Holder | None:
        """The holder as it stands in the file; None when there is no lease.

        Raises:
            OSError: the storage does not answer, which says nothing about the launcher.
        """
        try:
            text = (run_dir / FILE_NAME).read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        return cls.model_validate_json(text)

    def is_process(self, pid: int) -> bool:
        """Whether the holder is the process `pid` of this machine."""
        return self.pid == pid and self.host == socket.gethostname()

    def is_gone(self) -> bool:
        """Whether the holder is known to have ended: only its own machine can tell at once."""
        return self.host == socket.gethostname() and not is_alive(self.pid)


class Lease:
    """Held by the launcher: renewed by a thread until it is released."""

    def __init__(self, run_dir: Path, *, lease_s: float) -> None:
        self._path = run_dir / FILE_NAME
        self._interval_s = lease_s / RENEWALS_PER_LEASE
        self._count = 0
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._renew_until_released, name="lease", daemon=True)

    def take(self) -> None:
        """Write the lease for the first time and go on renewing it."""
        self._renew()
        self._thread.start()

    def release(self) -> None:
        """Remove the lease: agents that watch it end their ranks. A second call does nothing."""
        self._released.set()
        if self._thread.is_alive():
            self._thread.join()
        self._path.unlink(missing_ok=True)

    def _renew_until_released(self) -> None:
        while not self._released.wait(self._interval_s):
            try:
                self._renew()
            except OSError:
                continue  # the storage is away; agents that cannot read the lease wait as well

    def _renew(self) -> None:
        self._count += 1
        holder = {"host": socket.gethostname(), "pid": os.getpid(), "count": self._count}
        temporary = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        temporary.write_text(json.dumps(holder), encoding="utf-8")
        temporary.replace(self._path)


class LeaseWatch:
    """Held by an agent: says when the launcher is gone. A lease that cannot be read is not counted as gone."""

    def __init__(self, run_dir: Path, *, lease_s: float, clock: Clock | None = None) -> None:
        self._run_dir = run_dir
        self._lease_s = lease_s
        self._clock = clock or SystemClock()
        self._last: Holder | None = None
        self._seen_at = self._clock.monotonic()
        self._looked_at = -_LOOK_INTERVAL_S

    def ended(self) -> str | None:
        """Why the launcher counts as gone, in words; None while its lease holds."""
        now = self._clock.monotonic()
        if now - self._looked_at < _LOOK_INTERVAL_S:
            return None
        self._looked_at = now
        try:
            holder = Holder.read(self._run_dir)
        except OSError:
            self._seen_at = now
            return None
        if holder is None:
            return "the launcher released its lease"
        if holder.is_process(os.getppid()):
            return None
        if holder.is_gone():
            return f"the launcher (pid {holder.pid}) is gone"
        if holder != self._last:
            self._last, self._seen_at = holder, now
        elif now - self._seen_at > self._lease_s:
            return f"the launcher on {holder.host} has not renewed its lease for {now - self._seen_at:.0f} s"
        return None
