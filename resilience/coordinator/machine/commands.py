"""What comes in: requests of members and people, and the clock.

Commands are not journaled; the facts that they lead to are.
"""

from __future__ import annotations

import dataclasses

from resilience.coordinator.machine.facts import Agent, Note, Wish
from resilience.events import CheckpointFact, Decision, Detection, Evidence, OrderAnswer, RankExit, SnapshotFact, Strike
from resilience.policy import Copy

__all__ = [
    "AskRanks",
    "Close",
    "Command",
    "Conclude",
    "Decide",
    "Drain",
    "Heartbeat",
    "JoinAgent",
    "JoinRank",
    "Leave",
    "ObserveRpc",
    "Recover",
    "Report",
    "SetCordon",
    "Tick",
]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class JoinAgent:
    """An agent asks for a place."""

    run_id: str
    agent: Agent
    last_generation: int = 0
    exits: tuple[RankExit, ...] = ()
    reason: str = ""
    master_port: int = 0
    copies: tuple[Copy, ...] = ()
    """What its guardian holds of memory snapshots."""
    guardian_address: str = ""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class JoinRank:
    """A rank announces itself."""

    run_id: str
    generation: int
    rank: int
    world_size: int
    node: str
    pid: int = 0
    versions: tuple[tuple[str, str], ...] = ()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Heartbeat:
    """What a rank says of its training."""

    step: int
    micro_step: int = 0
    state: str = "training"
    loss: float | None = None
    tokens_per_s: float | None = None
    step_seconds: float | None = None
    last_verified_step: int = 0
    checks: tuple[tuple[str, int], ...] = ()
    abft_overhead_ratio: float | None = None
    step_seconds_since: tuple[float, ...] = ()
    residual_ratios: tuple[float, ...] = ()
    snapshot_seconds_since: tuple[float, ...] = ()
    snapshot_interval_steps: int | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """One report of a member."""

    run_id: str
    generation: int
    member: str
    sequence: int
    heartbeat: Heartbeat | None = None
    detections: tuple[Detection, ...] = ()
    decisions: tuple[Decision, ...] = ()
    strikes: tuple[Strike, ...] = ()
    exits: tuple[RankExit, ...] = ()
    checkpoints: tuple[CheckpointFact, ...] = ()
    snapshots: tuple[SnapshotFact, ...] = ()
    answers: tuple[OrderAnswer, ...] = ()
    notes: tuple[Note, ...] = ()
    deterministic: bool | None = None
    badput_seconds: tuple[tuple[str, float], ...] = ()
    num_skipped_steps: int = 0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Decide:
    """Rank 0 asks what to do."""

    evidence: Evidence


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Conclude:
    """Rank 0 says what it did."""

    run_id: str
    rank: int
    decision: Decision


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Leave:
    """A member ends."""

    run_id: str
    generation: int
    member: str
    exit_code: int
    reason: str = ""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SetCordon:
    """A person takes a device or a node out of use, or puts it back."""

    target: str
    cordoned: bool
    reason: str = ""
    devices: tuple[tuple[str, str], ...] = ()
    """(device, node) that the target stands for, from the history of all jobs."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Drain:
    """A person asks the run to leave after its next checkpoint."""

    reason: str = ""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AskRanks:
    """A person asks all ranks for something at the end of their step."""

    wish: Wish
    reason: str = ""
    step: int | None = None
    """With a rewind: to the snapshot of this step; None takes the newest clean one."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ObserveRpc:
    """A call was answered."""

    method: str
    seconds: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    """Time has passed."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Recover:
    """This machine was rebuilt from a journal by a new process."""

    pid: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Close:
    """The launcher ends the coordinator."""

    reason: str


Command = (
    JoinAgent
    | JoinRank
    | Report
    | Decide
    | Conclude
    | Leave
    | SetCordon
    | Drain
    | AskRanks
    | ObserveRpc
    | Tick
    | Recover
    | Close
)
