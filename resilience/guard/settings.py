"""Who this rank is and what it was given: everything that the step transaction needs besides the engine."""

from __future__ import annotations

import dataclasses
import socket
from collections.abc import Mapping

from resilience.clock import Clock, SystemClock
from resilience.config import Config
from resilience.context import DEVICE_VARIABLE, GENERATION_VARIABLE, NODE_VARIABLE

__all__ = ["Settings"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """One rank of one generation of one run."""

    run_id: str
    generation: int
    rank: int
    node: str
    device: str
    config: Config
    clock: Clock = dataclasses.field(default_factory=SystemClock)

    @classmethod
    def from_environment(cls, config: Config, *, run_id: str, rank: int, environ: Mapping[str, str]) -> Settings:
        """From the variables that the agent sets; outside of a launch by us, host and slot serve instead."""
        node = environ.get(NODE_VARIABLE, socket.gethostname())
        return cls(
            run_id=run_id,
            generation=int(environ.get(GENERATION_VARIABLE, "1")),
            rank=rank,
            node=node,
            device=environ.get(DEVICE_VARIABLE, f"{node}/{environ.get('LOCAL_RANK', '0')}"),
            config=config,
        )
