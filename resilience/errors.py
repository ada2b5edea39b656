"""Every error that this package raises for a person to read.

    ResilienceError                 one clear line; `exit_code` is what a command ends with
    ├── UsageError                  64  an option, a configuration or a fault plan is wrong
    │   ├── ConfigError
    │   └── FaultPlanError
    ├── UnsupportedVersionError     64  DeepSpeed or torch outside the tested range
    ├── CoordinatorUnreachableError 69  a coordinator is required and does not answer
    ├── FencedError                 75  this process belongs to a generation that has ended
    ├── ResourcesLostError          75  devices or nodes are gone; requeue elsewhere
    ├── CheckpointError              1  a checkpoint is missing, torn or corrupt
    ├── SnapshotError                1  a memory snapshot is missing, torn or corrupt, or has no room
    └── DoNotRequeueError           93  the same failure would come again

The message names the thing, the value and the fix. Invariants of our own use `assert`, never these.
"""

from __future__ import annotations

import enum

__all__ = [
    "CheckpointError",
    "ConfigError",
    "CoordinatorUnreachableError",
    "DoNotRequeueError",
    "ExitCode",
    "FaultPlanError",
    "FencedError",
    "ResilienceError",
    "ResourcesLostError",
    "SnapshotError",
    "UnsupportedVersionError",
    "UsageError",
]


class ExitCode(enum.IntEnum):
    """What a run or a command ends with (sysexits where one fits)."""

    DONE = 0
    FAILED = 1
    USAGE = 64
    UNAVAILABLE = 69
    REQUEUE = 75
    DO_NOT_REQUEUE = 93


class ResilienceError(Exception):
    """Base of the tree. `str(error)` is one line that names the thing, the value and the fix."""

    exit_code = ExitCode.FAILED


class UsageError(ResilienceError):
    """The person who started the command can mend this."""

    exit_code = ExitCode.USAGE


class ConfigError(UsageError):
    """A configuration file, block or environment variable is wrong."""


class FaultPlanError(UsageError):
    """A fault plan cannot be carried out as written."""


class UnsupportedVersionError(ResilienceError):
    """DeepSpeed or torch is outside the range that was tested."""

    exit_code = ExitCode.USAGE


class CoordinatorUnreachableError(ResilienceError):
    """No coordinator answers, and what was asked for cannot be done without one."""

    exit_code = ExitCode.UNAVAILABLE


class FencedError(ResilienceError):
    """A newer generation has begun; this process must not publish or step any more."""

    exit_code = ExitCode.REQUEUE


class ResourcesLostError(ResilienceError):
    """Not enough trusted devices are left."""

    exit_code = ExitCode.REQUEUE


class CheckpointError(ResilienceError):
    """A checkpoint that was asked for cannot be trusted or read."""


class SnapshotError(ResilienceError):
    """A memory snapshot cannot be trusted or read, or there is no room for it."""


class DoNotRequeueError(ResilienceError):
    """The data or the code is at fault; starting again elsewhere would fail in the same way."""

    exit_code = ExitCode.DO_NOT_REQUEUE
