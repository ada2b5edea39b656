"""The way to a coordinator: whether it answers, whether its clock agrees with ours, whether its secrets are kept."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from resilience.clock import Clock
from resilience.diagnosis.findings import Finding, ok, warn
from resilience.diagnosis.machine import MAX_SKEW_S

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["looks"]


def looks(ask: Callable[[], float], address: str, token_file: Path | None, clock: Clock) -> Iterator[Finding]:
    """All looks of this file.

    Args:
        ask: asks the coordinator for its time, in seconds since the Unix epoch.
        address: where it is, for the text.
        token_file: the file with its token.
        clock: ours.

    Raises:
        ResilienceError: it does not answer, or refuses.
    """
    asked_at, before = clock.monotonic(), clock.wall()
    told = ask()
    trip_s = clock.monotonic() - asked_at
    yield ok("coordinator", f"{address} answers within {trip_s * 1000:.0f} ms")
    yield _skew(told - (before + trip_s / 2), trip_s)
    if token_file is not None:
        yield _secret(token_file)


def _skew(skew_s: float, trip_s: float) -> Finding:
    # The answer may have taken any share of the trip, so half of it is the error of this measurement.
    if abs(skew_s) - trip_s / 2 > MAX_SKEW_S:
        fix = "synchronise the clocks (chrony, ntpd): times in reports would contradict each other"
        return warn("clock skew", f"the coordinator's is {skew_s:+.1f} s from ours", fix)
    return ok("clock skew", f"the coordinator's is {skew_s:+.2f} s from ours, ± {trip_s / 2:.2f} s")


def _secret(path: Path) -> Finding:
    status = path.stat()
    if status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        mode = stat.S_IMODE(status.st_mode)
        return warn("token", f"others can read {os.fspath(path)} (mode {mode:04o})", f"chmod 600 {os.fspath(path)}")
    return ok("token", f"{os.fspath(path)} is readable by you alone")
