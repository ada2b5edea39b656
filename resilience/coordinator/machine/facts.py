"""What happened. Facts are journaled, and the state is their fold; they are never changed, only added to.

Each is a frozen value of plain data, so that the journal can write it as JSON and read it back as it was.
"""

from __future__ import annotations

import dataclasses
import enum

from resilience.config import PolicyConfig
from resilience.events import (
    CheckpointFact,
    Decision,
    Detection,
    Evidence,
    Mode,
    OrderAnswer,
    Outcome,
    SnapshotFact,
    Strike,
)
from resilience.policy import Choice, Copy, Failure

__all__ = [
    "FACTS",
    "Agent",
    "AgentJoined",
    "AgentWaits",
    "Concluded",
    "CordonSet",
    "DecisionMade",
    "Device",
    "DrainAsked",
    "Fact",
    "FailureSeen",
    "Finished",
    "GenerationBegan",
    "InventoryTold",
    "MemberLeft",
    "NodeLost",
    "Note",
    "Observations",
    "Opened",
    "OrderTaken",
    "RankJoined",
    "RanksAsked",
    "RanksDone",
    "Recovered",
    "Reported",
    "RestartSettled",
    "Sampled",
    "Seat",
    "Wish",
]


class Wish(enum.StrEnum):
    """What a person can ask of all ranks."""

    REWIND = "rewind"
    SNAPSHOT = "snapshot"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A device that an agent offers; one rank runs on each."""

    slot: int
    device: str
    name: str = ""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Agent:
    """One node's agent."""

    node: str
    node_rank: int
    num_nodes: int
    address: str
    devices: tuple[Device, ...]
    pid: int = 0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """A rank's place in a generation."""

    rank: int
    node: str
    slot: int
    device: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """Something that a person should read."""

    kind: str
    message: str
    step: int = 0
    at: float = 0.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Observations:
    """What one histogram saw since the last sample."""

    metric: str
    label: str = ""
    """Value of the metric's only label, where it has one."""
    counts: tuple[int, ...]
    """For each bucket, and at last for +Inf; not cumulative."""
    total: float
    """Sum of the values."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A run begins. Always the first fact."""

    run_id: str
    mode: Mode
    limits: PolicyConfig
    lease_s: float
    started_at: float
    version: str = ""
    config_digest: str = ""
    num_spare_nodes: int = 0
    """Nodes of the launch that wait until another one is lost or out of use."""
    node_wait_s: float = 0.0
    """How long a lost node is waited for where there is no spare one."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Recovered:
    """A coordinator that had died came back from the journal."""

    pid: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CordonSet:
    """Devices were taken out of use, or put back."""

    devices: tuple[tuple[str, str], ...]
    """(device, node)"""
    cordoned: bool
    reason: str
    by: str = "operator"
    """operator, policy, or history: what an earlier job left behind."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AgentJoined:
    """An agent announced itself, for the first time or as another process."""

    agent: Agent


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AgentWaits:
    """An agent asks for a place in the next generation."""

    node: str
    reason: str = ""
    master_port: int = 0
    """Port that it offers for the ranks to meet at."""
    is_done: bool = False
    """All its ranks ended with 0: it needs a place only if other nodes fail."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class NodeLost:
    """Nothing was heard of a node's agent for a lease."""

    node: str
    reason: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class InventoryTold:
    """An agent said what its guardian holds, where that is not what it said before."""

    node: str
    guardian_address: str
    """Where guardians of other nodes reach its own; empty where there is none."""
    copies: tuple[Copy, ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GenerationBegan:
    """All agents were there: ranks have their places."""

    generation: int
    seats: tuple[Seat, ...]
    reason: str
    restore: Choice | None = None
    """Where its state comes from; None for the first one."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RankJoined:
    """A rank announced itself."""

    rank: int
    pid: int
    versions: tuple[tuple[str, str], ...] = ()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Reported:
    """What was new in a member's report. Heartbeats are not in here: they are sampled."""

    generation: int
    member: str
    sequence: int
    detections: tuple[Detection, ...] = ()
    strikes: tuple[Strike, ...] = ()
    checkpoints: tuple[CheckpointFact, ...] = ()
    snapshots: tuple[SnapshotFact, ...] = ()
    answers: tuple[OrderAnswer, ...] = ()
    notes: tuple[Note, ...] = ()
    deterministic: bool | None = None
    num_skipped_steps: int = 0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DecisionMade:
    """The coordinator decided, on this evidence."""

    decision: Decision
    evidence: Evidence | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Concluded:
    """What a rank executed. It overrides what the coordinator had decided."""

    decision: Decision


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class OrderTaken:
    """A restart or a stop takes effect: from now on agents are told."""

    decision_id: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class FailureSeen:
    """A generation failed."""

    failure: Failure
    detections: tuple[Detection, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RestartSettled:
    """A restart ended: training went on, or the next generation failed before its first step."""

    decision_id: str
    outcome: Outcome
    latency_ms: float
    lost_s: float
    resumed_step: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """What heartbeats said since the last sample, summed up."""

    generation: int
    steps: tuple[tuple[int, int], ...] = ()
    """(rank, last step taken), where it changed."""
    states: tuple[tuple[int, str], ...] = ()
    """(rank, state), where it changed."""
    durations: tuple[tuple[int, float], ...] = ()
    """(step, seconds) of the steps that rank 0 took."""
    first_step_at: float | None = None
    """When the first step of this generation began, in the sample that brings it."""
    last_verified_step: int = 0
    checks: tuple[tuple[int, str, int], ...] = ()
    """(rank, site, operations checked since the generation began), where it changed."""
    observations: tuple[Observations, ...] = ()
    badput: tuple[tuple[str, float], ...] = ()
    """(cause, seconds of the run)."""
    num_snapshots: int = 0
    """Taken by rank 0 since the last sample."""
    snapshot_interval_steps: int | None = None
    """Steps between two snapshots, as rank 0 said last."""
    snapshot_steps: tuple[tuple[str, int], ...] = ()
    """(tier, step of the newest snapshot that is whole there), and for `clean` the newest one known to be clean."""
    loss: float | None = None
    tokens_per_s: float | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MemberLeft:
    """A rank or an agent ended and said so."""

    member: str
    generation: int
    exit_code: int
    reason: str = ""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RanksDone:
    """Every rank of every node ended with 0: agents may go."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DrainAsked:
    """The run is to leave with 75 after its next checkpoint."""

    reason: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RanksAsked:
    """A person asked all ranks for something; rank 0 is told, and tells the others at the next boundary."""

    wish: Wish
    reason: str = ""
    step: int | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """The run is over. After it only people may still change something: a cordon."""

    exit_code: int
    outcome: str
    reason: str


Fact = (
    Opened
    | Recovered
    | CordonSet
    | AgentJoined
    | AgentWaits
    | NodeLost
    | InventoryTold
    | GenerationBegan
    | RankJoined
    | Reported
    | DecisionMade
    | Concluded
    | OrderTaken
    | FailureSeen
    | RestartSettled
    | Sampled
    | MemberLeft
    | RanksDone
    | DrainAsked
    | RanksAsked
    | Finished
)

FACTS: dict[str, type] = {
    cls.__name__: cls
    for cls in (
        Opened,
        Recovered,
        CordonSet,
        AgentJoined,
        AgentWaits,
        NodeLost,
        InventoryTold,
        GenerationBegan,
        RankJoined,
        Reported,
        DecisionMade,
        Concluded,
        OrderTaken,
        FailureSeen,
        RestartSettled,
        Sampled,
        MemberLeft,
        RanksDone,
        DrainAsked,
        RanksAsked,
        Finished,
    )
}
"""By name, as the journal writes them."""
