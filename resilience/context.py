"""What every process of a run must know: written once by the launcher, read by agents and ranks.

The file has mode 0600 and lies in the run directory. Processes find it by the variable `RESILIENCE_CONTEXT`, which
holds its path and nothing secret. What differs from rank to rank comes in the other variables named here.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import pydantic

from resilience.config import Config
from resilience.errors import ConfigError

__all__ = [
    "ARENA_VARIABLE",
    "CONTEXT_VARIABLE",
    "DEVICE_VARIABLE",
    "GENERATION_VARIABLE",
    "NODE_VARIABLE",
    "RESTORE_VARIABLE",
    "RunContext",
]

CONTEXT_VARIABLE = "RESILIENCE_CONTEXT"
GENERATION_VARIABLE = "RESILIENCE_GENERATION"
NODE_VARIABLE = "RESILIENCE_NODE"
DEVICE_VARIABLE = "RESILIENCE_DEVICE"
ARENA_VARIABLE = "RESILIENCE_ARENA"
"""The node's arena (resilience/snapshot/arena.py); absent where there is no memory tier."""
RESTORE_VARIABLE = "RESILIENCE_RESTORE"
"""The folder in it that was prepared for this generation; absent where there is nothing to restore."""


class RunContext(pydantic.BaseModel):
    """One run, as its agents and ranks see it."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    run_id: str
    """Name of the run."""
    run_dir: Path
    """Its directory, absolute."""
    coordinator_address: str
    """`host:port` of the coordinator's gRPC service."""
    token_file: Path | None = None
    """File with the shared token, mode 0600; None on an open loopback coordinator."""
    config: Config = Config()
    """The configuration, merged and validated."""
    fault_plan: Path | None = None
    """The fault plan, if one was given."""

    def write(self, path: Path) -> None:
        """Write the context to `path` with mode 0600, atomically."""
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(self.model_dump_json(indent=2))
        temporary.replace(path)

    @classmethod
    def read(cls, path: Path) -> RunContext:
        """Read a context.

        Raises:
            ConfigError: it cannot be read, or is not a context.
        """
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"{path}: run context cannot be read ({error.strerror})") from None
        except pydantic.ValidationError as error:
            raise ConfigError(f"{path}: not a run context of this version ({error.error_count()} problems)") from None

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> RunContext | None:
        """The context of the run that this process belongs to, or None outside of a run."""
        path = environ.get(CONTEXT_VARIABLE)
        return cls.read(Path(path)) if path else None
