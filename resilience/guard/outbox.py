"""What a rank has to say and the coordinator has not acknowledged. Pure bookkeeping: no threads, no network, no clock.

Facts are gathered into numbered reports. A report stays here until its number is acknowledged, and is sent again after
a reconnection, so that a coordinator that was killed between receiving and journalling loses nothing. Heartbeats are
not facts: only the newest is worth sending.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping

from resilience.events import CheckpointFact, Decision, Detection, OrderAnswer, SnapshotFact, Strike
from resilience.rpc.codec import to_proto
from resilience.rpc.v1 import coordinator_pb2 as pb

__all__ = ["Fact", "Outbox"]

Fact = Detection | Decision | Strike | CheckpointFact | SnapshotFact | OrderAnswer | pb.Note
"""What can be reported one by one."""

_FIELD_OF = {
    Detection: "detections",
    Decision: "decisions",
    Strike: "strikes",
    CheckpointFact: "checkpoints",
    SnapshotFact: "snapshots",
    OrderAnswer: "answers",
    pb.Note: "notes",
}

MAX_FACTS_PER_REPORT = 256
MAX_SAMPLES_PER_REPORT = 256
"""Bounds a report: 256 detections are about 60 kB, far below the limit of a message."""


class Outbox:
    """Facts in the order in which they happened, and the reports that carry them."""

    def __init__(self, *, run_id: str, generation: int, member: str) -> None:
        self._header = pb.ReportRequest(run_id=run_id, generation=generation, member=member)
        self._facts: deque[Fact] = deque()
        self._unacknowledged: deque[pb.ReportRequest] = deque()
        self._sequence = 0
        self._deterministic: bool | None = None
        self._badput: dict[str, float] = {}
        self._num_skipped = 0
        self._is_demanded = False

    @property
    def is_empty(self) -> bool:
        """Whether everything that was put in here has been acknowledged."""
        return not (self._unacknowledged or self.has_news)

    @property
    def has_news(self) -> bool:
        """Whether the next report would carry more than a heartbeat."""
        facts = self._facts or self._badput or self._num_skipped or self._deterministic is not None
        return bool(facts or self._is_demanded)

    def put(self, fact: Fact) -> None:
        """Add a fact."""
        assert type(fact) in _FIELD_OF, fact
        self._facts.append(fact)

    def add_badput(self, seconds: Mapping[str, float]) -> None:
        """Add seconds that were not spent on steps, by cause."""
        for cause, amount in seconds.items():
            self._badput[cause] = self._badput.get(cause, 0.0) + amount

    def add_skipped_step(self) -> None:
        """Count an optimizer step that DeepSpeed skipped."""
        self._num_skipped += 1

    def set_deterministic(self, deterministic: bool) -> None:
        """Record whether the generation was measured to be bit-reproducible."""
        self._deterministic = deterministic

    def demand_acknowledgement(self) -> None:
        """Have the next report acknowledged like a fact, even if it carries a heartbeat only: the last one."""
        self._is_demanded = True

    def next_report(self, heartbeat: pb.Heartbeat | None = None) -> pb.ReportRequest:
        """The next report, with the facts that are waiting. It carries a number and is kept if it holds any."""
        self._sequence += 1
        report = pb.ReportRequest(sequence=self._sequence, heartbeat=heartbeat)
        report.MergeFrom(self._header)
        kept = self.has_news
        for _ in range(min(len(self._facts), MAX_FACTS_PER_REPORT)):
            _append(report, self._facts.popleft())
        for cause, seconds in self._badput.items():
            report.badput_seconds[cause] = seconds
        report.num_skipped_steps = self._num_skipped
        if self._deterministic is not None:
            report.deterministic = self._deterministic
        self._badput, self._num_skipped, self._deterministic, self._is_demanded = {}, 0, None, False
        if kept:
            self._unacknowledged.append(report)
        return report

    def acknowledge(self, sequence: int) -> None:
        """Forget all reports up to `sequence`."""
        while self._unacknowledged and self._unacknowledged[0].sequence <= sequence:
            self._unacknowledged.popleft()

    def unacknowledged(self) -> Iterable[pb.ReportRequest]:
        """The reports to send again after a reconnection, oldest first."""
        return tuple(self._unacknowledged)


def _append(report: pb.ReportRequest, fact: Fact) -> None:
    message = fact if isinstance(fact, pb.Note) else to_proto(fact)
    getattr(report, _FIELD_OF[type(fact)]).append(message)
