"""What the shell must do after a command, in the order in which the effects come.

`Record` must be durable before anything that follows it is executed and before the caller is answered: what was
promised is what a recovered coordinator remembers. The others may be executed twice (after a crash they are), so each
is idempotent. `Finish` comes last and once.
"""

from __future__ import annotations

import dataclasses
import enum

from resilience.coordinator.machine.facts import Fact
from resilience.events import Verdict

__all__ = ["Effect", "Finish", "Record", "RefusalKind", "Refused", "RememberCordon", "RememberFault"]


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """Write `fact` to the journal."""

    fact: Fact
    at: float


@dataclasses.dataclass(frozen=True, slots=True)
class RememberFault:
    """Write a settled fault into the device's history, which outlives the job."""

    fault_id: str
    """`g<generation>-s<step>`: however often a device's checks alarm in one step, it is one fault."""
    device: str
    node: str
    verdict: Verdict
    at: float


@dataclasses.dataclass(frozen=True, slots=True)
class RememberCordon:
    """Write into the history that a device is out of use, or back; an older word never overrides a newer one."""

    device: str
    node: str
    cordoned: bool
    reason: str
    at: float


@dataclasses.dataclass(frozen=True, slots=True)
class Finish:
    """The run is over."""

    exit_code: int


Effect = Record | RememberFault | RememberCordon | Finish


class RefusalKind(enum.StrEnum):
    """Why a request was refused; the service maps it to a gRPC status."""

    STALE = "stale"
    UNKNOWN = "unknown"
    INVALID = "invalid"


class Refused(Exception):
    """A request that changes nothing. The text names the thing, its value and the fix."""

    def __init__(self, kind: RefusalKind, message: str) -> None:
        super().__init__(message)
        self.kind = kind
