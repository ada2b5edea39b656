"""The state: everything that a recovered coordinator needs, as plain data. Only `fold` changes it."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable

from resilience.config import PolicyConfig
from resilience.coordinator.machine.facts import Agent, Note, Seat, Wish
from resilience.events import (
    Action,
    CheckpointFact,
    CheckpointKind,
    Decision,
    Detection,
    Evidence,
    Mode,
    OrderAnswer,
    SnapshotFact,
    Strike,
    Verdict,
)
from resilience.metrics import BY_NAME
from resilience.policy import Ancestor, Choice, Copy, Failure

__all__ = [
    "About",
    "Asked",
    "Cordon",
    "Ending",
    "GenerationRecord",
    "Histogram",
    "Node",
    "Order",
    "RankSeat",
    "State",
    "StoryLine",
    "places_of",
]

MAX_DURATIONS = 4096
"""Steps whose durations are kept one by one, so that lost work can be told exactly that far back."""

MAX_STORY = 10_000


@dataclasses.dataclass
class Node:
    """An agent, as the coordinator knows it."""

    agent: Agent
    waiting: bool = False
    """Asks for a place in the next generation."""
    is_done: bool = False
    """All its ranks of the current generation ended with 0."""
    master_port: int = 0
    """Port that it offered with that, for the ranks to meet at."""
    guardian_address: str = ""
    copies: tuple[Copy, ...] = ()
    """What its guardian held when it last asked for a place."""
    left: int | None = None
    """The code that it left with …"""
    left_at: float = 0.0
    """… and when."""
    lost_at: float | None = None
    """When its agent was given up; one that comes back is another entry."""

    @property
    def is_there(self) -> bool:
        return self.left is None and self.lost_at is None


@dataclasses.dataclass
class RankSeat:
    """A rank of the current generation."""

    seat: Seat
    joined: bool = False
    pid: int = 0
    left: int | None = None
    step: int = 0
    state: str = "starting"
    sequence: int = 0


@dataclasses.dataclass
class GenerationRecord:
    """One generation, for the report."""

    generation: int
    began_at: float
    world_size: int
    reason: str
    first_step_at: float | None = None
    loading_s: float = 0.0
    """Seconds of loading checkpoints before its first step."""
    ended_at: float | None = None
    ended_by: str = ""
    places: tuple[tuple[str, tuple[int, ...]], ...] = ()
    """Its nodes in their order, with their ranks."""
    restore: Choice | None = None
    """Where its state came from, as it was chosen; None for the first one."""
    resumed_after: int | None = None
    """The step after which it went on, once that is known."""
    damaged: bool = False
    """Whether its state could not be trusted when it ended."""
    rewinding_to: int | None = None
    """Step of the snapshot that it was going back to when it ended."""

    @property
    def ancestor(self) -> Ancestor:
        """What the choice of a later generation's state asks about this one."""
        chosen = self.restore.step if self.restore is not None and self.restore.is_snapshot else None
        return Ancestor(
            generation=self.generation,
            places=self.places,
            resumed_after=chosen if self.resumed_after is None else self.resumed_after,
            damaged=self.damaged,
            rewinding_to=self.rewinding_to,
        )


def places_of(seats: Iterable[Seat]) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """The nodes of `seats` in their order, with their ranks."""
    found: dict[str, list[int]] = {}
    for seat in seats:
        found.setdefault(seat.node, []).append(seat.rank)
    return tuple((node, tuple(ranks)) for node, ranks in found.items())


@dataclasses.dataclass
class Order:
    """A restart or a stop that was decided; it takes effect when the rank concludes it, or after a grace."""

    decision_id: str
    action: Action
    at: float


@dataclasses.dataclass
class Ending:
    """The run is to end."""

    exit_code: int
    reason: str
    decision_id: str = ""


@dataclasses.dataclass
class Cordon:
    """A device that is out of use."""

    node: str
    reason: str
    at: float


@dataclasses.dataclass
class Asked:
    """What a person asked of all ranks, the newest of its kind."""

    number: int
    generation: int
    reason: str
    step: int | None
    at: float
    answer: OrderAnswer | None = None
    """What became of it, where that is told: of a snapshot."""


About = dict[str, str | int]
"""What a line of the story speaks of, by the names of report.json."""


@dataclasses.dataclass
class StoryLine:
    """One line of the run's story."""

    sequence: int
    at: float
    kind: str
    text: str
    generation: int
    step: int
    about: About = dataclasses.field(default_factory=dict)
    """decision_id, detection_id, action, rank, node, device, …: as far as it speaks of one."""


@dataclasses.dataclass
class Histogram:
    """Counts per bucket (not cumulative, the last is +Inf) and the sum of the values."""

    counts: list[int]
    total: float = 0.0

    def add(self, counts: tuple[int, ...], total: float) -> None:
        assert len(counts) == len(self.counts), "buckets of another version"
        self.counts = [have + new for have, new in zip(self.counts, counts, strict=True)]
        self.total += total


@dataclasses.dataclass
class Telemetry:
    """Sums over the run."""

    num_steps_taken: int = 0
    durations: collections.OrderedDict[int, float] = dataclasses.field(default_factory=collections.OrderedDict)
    """Seconds of each kept step, newest last; the oldest are folded into `kept_s`."""
    kept_s: float = 0.0
    badput_s: dict[str, float] = dataclasses.field(default_factory=dict)
    checks: dict[str, int] = dataclasses.field(default_factory=dict)
    """By site, over all generations."""
    rank_checks: dict[tuple[int, str], int] = dataclasses.field(default_factory=dict)
    """(rank, site) -> count that the rank reported last, in this generation."""
    histograms: dict[tuple[str, str], Histogram] = dataclasses.field(default_factory=dict)
    num_skipped_steps: int = 0
    num_repeated_steps: int = 0
    """Steps that were taken again after a restart."""
    num_snapshots: int = 0
    timed: set[str] = dataclasses.field(default_factory=set)
    """Decisions whose duration was counted."""

    def histogram(self, metric: str, label: str = "") -> Histogram:
        found = self.histograms.get((metric, label))
        if found is None:
            found = self.histograms[metric, label] = Histogram([0] * (len(BY_NAME[metric].buckets) + 1))
        return found


@dataclasses.dataclass
class State:
    """A run."""

    run_id: str = ""
    mode: Mode = Mode.ENFORCE
    limits: PolicyConfig = dataclasses.field(default_factory=PolicyConfig)
    lease_s: float = 15.0
    started_at: float = 0.0
    config_digest: str = ""
    num_spare_nodes: int = 0
    node_wait_s: float = 0.0
    versions: dict[str, str] = dataclasses.field(default_factory=dict)

    nodes: dict[str, Node] = dataclasses.field(default_factory=dict)
    generation: int = 0
    generation_ended: bool = True
    seats: dict[int, RankSeat] = dataclasses.field(default_factory=dict)
    generations: list[GenerationRecord] = dataclasses.field(default_factory=list)
    failures: list[Failure] = dataclasses.field(default_factory=list)

    detections: dict[str, Detection] = dataclasses.field(default_factory=dict)
    verdicts: dict[str, Verdict] = dataclasses.field(default_factory=dict)
    """What decisions settled, also for detections that have not arrived yet."""
    decisions: dict[str, Decision] = dataclasses.field(default_factory=dict)
    evidence: dict[str, Evidence] = dataclasses.field(default_factory=dict)
    """By decision."""
    strikes: dict[str, Strike] = dataclasses.field(default_factory=dict)
    checkpoints: list[CheckpointFact] = dataclasses.field(default_factory=list)
    refusals: set[tuple[int, int, str, int]] = dataclasses.field(default_factory=set)
    """(step, generation that took it, node, generation that refused it) of memory snapshots that were not loaded."""
    notes: list[Note] = dataclasses.field(default_factory=list)
    cordons: dict[str, Cordon] = dataclasses.field(default_factory=dict)

    deterministic: bool | None = None
    last_verified_step: int = 0
    skipped_at_step: int = 0
    """The newest step that was handed to DeepSpeed's skip …"""
    num_skips_in_a_row: int = 0
    """… and how many there were in a row with it, outside the loss scaler's search."""
    loss: float | None = None
    tokens_per_s: float | None = None

    order: Order | None = None
    ending: Ending | None = None
    drain: str | None = None
    asked: dict[Wish, Asked] = dataclasses.field(default_factory=dict)
    loaded_snapshots: list[SnapshotFact] = dataclasses.field(default_factory=list)
    """Those that a generation went on from."""
    loaded_checkpoints: list[CheckpointFact] = dataclasses.field(default_factory=list)
    """As rank 0 told of them."""
    snapshot_interval_steps: int | None = None
    snapshot_steps: dict[str, int] = dataclasses.field(default_factory=dict)
    """Tier -> step of the newest snapshot that was whole there and belongs to the path that training is on; `clean` ->
    step of the newest one that is known to be clean."""
    finished: Ending | None = None
    finished_at: float | None = None
    outcome: str = ""

    telemetry: Telemetry = dataclasses.field(default_factory=Telemetry)
    story: list[StoryLine] = dataclasses.field(default_factory=list)
    num_lines: int = 0
    told: set[str] = dataclasses.field(default_factory=set)
    """Detections that have their line."""

    @property
    def newest_step(self) -> int:
        """Newest step that all ranks of the generation have taken or resume after, as far as it was sampled."""
        return min((seat.step for seat in self.seats.values()), default=0)

    @property
    def newest_checkpoint_step(self) -> int:
        """Step of the newest checkpoint that was published, and has not been refused or doubted since."""
        trusted: dict[tuple[str, str], int] = {}
        for point in self.checkpoints:
            if point.kind is CheckpointKind.PUBLISHED:
                trusted[point.directory, point.tag] = point.step
            elif point.kind is not CheckpointKind.LOADED:
                trusted.pop((point.directory, point.tag), None)
        return max(trusted.values(), default=0)

    @property
    def num_nodes(self) -> int:
        """Nodes that the launch asked for; 0 before the first agent came."""
        return next((node.agent.num_nodes for node in self.nodes.values()), 0)

    @property
    def places(self) -> tuple[str, ...]:
        """The nodes of the newest generation in their order; before the first one, those that will be."""
        if self.generations:
            return tuple(name for name, _ in self.generations[-1].places)
        num_places = self.num_nodes - self.num_spare_nodes
        ranked = sorted((node.agent.node_rank, name) for name, node in self.nodes.items())
        return tuple(name for node_rank, name in ranked if node_rank < num_places)

    def cordoned_device(self, node: str) -> str | None:
        """The first device of `node` that is out of use."""
        return next((d.device for d in self.nodes[node].agent.devices if d.device in self.cordons), None)

    def spares_for(self, node: str) -> list[str]:
        """Nodes that wait without a place and could take that of `node`, in hostfile order."""
        places, num_devices = self.places, len(self.nodes[node].agent.devices)
        found = [
            (other.agent.node_rank, name)
            for name, other in self.nodes.items()
            if name not in places
            and other.waiting
            and other.is_there
            and self.cordoned_device(name) is None
            and len(other.agent.devices) == num_devices
        ]
        return [name for _, name in sorted(found)]

    def tell(self, at: float, kind: str, text: str, *, step: int = 0, about: About | None = None) -> None:
        """Add a line to the story; the oldest make room."""
        self.num_lines += 1
        self.story.append(StoryLine(self.num_lines, at, kind, text, self.generation, step, about or {}))
        if len(self.story) > MAX_STORY:
            del self.story[: MAX_STORY // 10]
