"""What the ranks' next reports bring back anyway: heartbeats, leases, and sums that are not yet sampled.

It is not journaled. What of it must survive is turned into a `Sampled` fact, at most every `sample_interval_s`; a
coordinator that is killed loses at most so much of its telemetry, and nothing else.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Iterable

from resilience.coordinator.machine.commands import Heartbeat
from resilience.coordinator.machine.facts import Observations, Sampled
from resilience.coordinator.machine.snapshots import newest_steps
from resilience.coordinator.machine.state import State
from resilience.events import SnapshotFact, SnapshotKind
from resilience.metrics import BY_NAME, bucket_of

__all__ = ["Pulse", "sample", "sample_interval_s"]

_RANKS_PER_SECOND = 64
"""Ranks whose steps one second's worth of journal may carry."""

_MEASURED_BY_RANKS = frozenset({"replay", "rewind", "check", "snapshot"})
"""Causes of badput that ranks report. The coordinator knows the others by itself, from first steps and checkpoints, and
causes are labels of a metric, so no rank may invent one."""

_ON_THE_WAY = frozenset({"starting", "fast_forwarding"})
"""States of a rank that is not yet where it goes on: its step is not the run's."""

_MAX_SNAPSHOTS = 64
_PHASES = {SnapshotKind.PROTECTED: "protect", SnapshotKind.LOADED: "load", SnapshotKind.FLUSHED: "flush"}
"""Of what members told. The copy is timed by the ranks: guardians pass over what is overwritten soon."""


@dataclasses.dataclass
class _Sum:
    counts: list[int]
    total: float = 0.0


@dataclasses.dataclass
class Pulse:
    """The volatile half of the machine."""

    since: float
    """When this process began to watch: leases of members not heard of yet count from here."""
    seen: dict[str, float] = dataclasses.field(default_factory=dict)
    """Member -> its last sign of life."""
    beats: dict[int, Heartbeat] = dataclasses.field(default_factory=dict)
    """Rank -> its last heartbeat in this generation."""
    sequences: dict[str, int] = dataclasses.field(default_factory=dict)
    """Member -> newest sequence whose increments are in the sums."""
    moved_at: float = 0.0
    """When a rank last finished a micro-step."""
    sampled_at: float = 0.0
    durations: list[tuple[int, float]] = dataclasses.field(default_factory=list)
    first_step_at: float | None = None
    sums: dict[tuple[str, str], _Sum] = dataclasses.field(default_factory=dict)
    badput: dict[str, float] = dataclasses.field(default_factory=dict)
    snapshots: collections.OrderedDict[tuple[int, int], dict[tuple[str, SnapshotKind], SnapshotFact]] = (
        dataclasses.field(default_factory=collections.OrderedDict)
    )
    """(step, generation) -> what was told last of each node's part; the newest ones."""
    num_snapshots: int = 0
    """Taken by rank 0 since the last sample."""

    def take_snapshots(self, facts: Iterable[SnapshotFact]) -> None:
        """What members told of memory snapshots: too much to be journaled, and gone with the snapshots."""
        for fact in facts:
            self.snapshots.setdefault((fact.step, fact.generation), {})[fact.node, fact.kind] = fact
            phase = _PHASES.get(fact.kind)
            if phase is not None:
                self.observe("snapshot_seconds", fact.seconds, phase)
            while len(self.snapshots) > _MAX_SNAPSHOTS:
                self.snapshots.popitem(last=False)

    def age(self, member: str, now: float) -> float:
        """Seconds since `member` gave a sign of life."""
        return now - self.seen.get(member, self.since)

    def begin_generation(self, now: float) -> None:
        """Ranks of the generation before say nothing any more."""
        self.beats.clear()
        self.sequences.clear()
        for member in [member for member in self.seen if member.startswith("rank:")]:
            del self.seen[member]
        self.moved_at = now
        self.first_step_at = None

    def observe(self, metric: str, value: float, label: str = "") -> None:
        """One value into a histogram; values that are not finite are left out."""
        if not math.isfinite(value):
            return
        row = BY_NAME[metric]
        found = self.sums.setdefault((metric, label), _Sum([0] * (len(row.buckets) + 1)))
        found.counts[bucket_of(row, value)] += 1
        found.total += value

    def take_beat(self, state: State, rank: int, beat: Heartbeat, *, is_new: bool, now: float) -> None:
        """A heartbeat of `rank`; its increments count once (`is_new`), its levels always."""
        before = self.beats.get(rank)
        if before is None or (beat.step, beat.micro_step) != (before.step, before.micro_step):
            self.moved_at = now
        self.beats[rank] = beat
        if not is_new:
            return
        for seconds in beat.step_seconds_since:
            self.observe("step_seconds", seconds)
        for ratio in beat.residual_ratios:
            self.observe("abft_residual_ratio", ratio)
        for seconds in beat.snapshot_seconds_since:
            self.observe("snapshot_seconds", seconds, "copy")
        self.num_snapshots += len(beat.snapshot_seconds_since) if rank == 0 else 0
        if rank == 0 and beat.step_seconds_since:
            self._take_steps(state, beat, now)

    def _take_steps(self, state: State, beat: Heartbeat, now: float) -> None:
        first = beat.step - len(beat.step_seconds_since) + 1
        self.durations += [(first + index, seconds) for index, seconds in enumerate(beat.step_seconds_since)]
        if state.generations and state.generations[-1].first_step_at is None and self.first_step_at is None:
            self.first_step_at = max(state.generations[-1].began_at, now - sum(beat.step_seconds_since))

    def take_badput(self, state: State, seconds: tuple[tuple[str, float], ...]) -> None:
        """Seconds of one rank; all ranks wait together, so they count by the share of one rank."""
        for cause, spent in seconds:
            if cause in _MEASURED_BY_RANKS and math.isfinite(spent) and spent > 0:
                share = spent / max(1, len(state.seats))
                self.badput[cause] = self.badput.get(cause, 0.0) + share


def sample_interval_s(num_ranks: int) -> float:
    """How often heartbeats are sampled into the journal."""
    return max(1.0, num_ranks / _RANKS_PER_SECOND)


def sample(state: State, pulse: Pulse, now: float) -> Sampled | None:
    """What has changed since the last sample, or None; the sums in `pulse` begin again."""
    steps = tuple(
        (rank, beat.step)
        for rank, beat in sorted(pulse.beats.items())
        if beat.step != state.seats[rank].step and beat.state not in _ON_THE_WAY
    )
    states = tuple((rank, b.state) for rank, b in sorted(pulse.beats.items()) if b.state != state.seats[rank].state)
    verified = min((beat.last_verified_step for beat in pulse.beats.values()), default=0)
    known = state.telemetry.rank_checks
    checks = tuple(
        (rank, site, count)
        for rank, beat in sorted(pulse.beats.items())
        for site, count in beat.checks
        if count != known.get((rank, site))
    )
    rates = [beat.tokens_per_s for beat in pulse.beats.values() if beat.tokens_per_s is not None]
    lead = pulse.beats.get(0)
    tiers = newest_steps(state, pulse.snapshots)
    snapshot_steps = tuple(sorted(pair for pair in tiers.items() if state.snapshot_steps.get(pair[0]) != pair[1]))
    pulse.sampled_at = now
    if not (steps or states or checks or pulse.durations or pulse.sums or pulse.badput or snapshot_steps):
        return None
    fact = Sampled(
        generation=state.generation,
        steps=steps,
        states=states,
        durations=tuple(pulse.durations),
        first_step_at=pulse.first_step_at,
        last_verified_step=verified,
        checks=checks,
        observations=tuple(
            Observations(metric=metric, label=label, counts=tuple(found.counts), total=found.total)
            for (metric, label), found in pulse.sums.items()
        ),
        badput=tuple(sorted(pulse.badput.items())),
        num_snapshots=pulse.num_snapshots,
        snapshot_interval_steps=None if lead is None else lead.snapshot_interval_steps,
        snapshot_steps=snapshot_steps,
        loss=None if lead is None else lead.loss,
        tokens_per_s=sum(rates) if rates else None,
    )
    pulse.durations, pulse.first_step_at, pulse.sums, pulse.badput, pulse.num_snapshots = [], None, {}, {}, 0
    return fact
