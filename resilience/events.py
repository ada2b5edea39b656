"""Facts that cross a boundary between parts, as frozen values. No behaviour, no input or output.

Words used everywhere: a *run* is one launch; a *generation* is one set of processes of a run (a restart begins the
next one); a *step* is an optimizer step, counted from 1, and step s takes `global_steps` from s − 1 to s; a
*micro_step* counts the micro-batches of a step from 0; an *attempt* counts executions of the same step in the same
generation (0 = the first, n = the n-th replay); a *rank*, a *node* and a *device* are where it happened.
"""

from __future__ import annotations

import dataclasses
import enum

__all__ = [
    "Action",
    "Check",
    "CheckpointFact",
    "CheckpointKind",
    "Decision",
    "Detection",
    "DetectionKind",
    "Evidence",
    "Mode",
    "OrderAnswer",
    "Origin",
    "Outcome",
    "Progress",
    "RankExit",
    "SnapshotFact",
    "SnapshotKind",
    "Strike",
    "Verdict",
]


class Mode(enum.StrEnum):
    """What the guard may do with what it sees."""

    ENFORCE = "enforce"
    SHADOW = "shadow"
    OFF = "off"


class Action(enum.StrEnum):
    """The rungs of the ladder, cheapest first."""

    CONTINUE = "continue"
    CORRECTED = "corrected"
    REPLAY = "replay"
    REWIND = "rewind"
    RESTART = "restart"
    RESTORE = "restore"
    QUARANTINE = "quarantine"
    STOP = "stop"


class Check(enum.StrEnum):
    """Which check raised the alarm."""

    CHECKSUM = "checksum"
    INVARIANT = "invariant"
    SCREEN = "screen"
    NORM = "norm"
    PROCESS = "process"
    AT_REST = "at_rest"
    REPLICA = "replica"
    LOSS = "loss"
    OPERATOR = "operator"


class CheckpointKind(enum.StrEnum):
    """What happened to a checkpoint."""

    PUBLISHED = "published"
    LOADED = "loaded"
    REFUSED = "refused"
    DOUBTED = "doubted"


class SnapshotKind(enum.StrEnum):
    """What happened to a memory snapshot, or to a node's part of it."""

    TAKEN = "taken"
    PROTECTED = "protected"
    FLUSHED = "flushed"
    LOADED = "loaded"
    REFUSED = "refused"


class DetectionKind(enum.StrEnum):
    """What the check saw (not what caused it)."""

    INF = "inf"
    NAN = "nan"
    NEAR_INF = "near_inf"
    MISMATCH = "mismatch"
    NORM_SPIKE = "norm_spike"
    LOSS_SPIKE = "loss_spike"
    EXIT = "exit"
    HANG = "hang"


class Verdict(enum.StrEnum):
    """What became of a detection. `PENDING` until its decision is concluded."""

    PENDING = "pending"
    TRANSIENT = "transient"
    PERSISTENT = "persistent"
    DETERMINISTIC = "deterministic"
    PROPAGATED = "propagated"
    FALSE_POSITIVE = "false_positive"


class Origin(enum.StrEnum):
    """On whose word a decision was executed."""

    COORDINATOR = "coordinator"
    RANK = "rank"


class Outcome(enum.StrEnum):
    """How the execution of a decision ended."""

    PENDING = "pending"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    SUPERSEDED = "superseded"
    SHADOWED = "shadowed"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Detection:
    """One alarm of one check on one rank."""

    detection_id: str
    """`g<generation>-r<rank>-<sequence>`: unique in a run."""
    generation: int
    step: int
    micro_step: int
    attempt: int
    rank: int
    node: str
    device: str
    """Stable identity of the device (UUID of a GPU; host, socket and slot for a CPU)."""
    site: str
    """Where: a site of the fault plan (`attention.scores`, `linear.wgrad`, `gradient`, `process`, …)."""
    layer: int
    """Which call of that site in the forward order; −1 where it has no meaning."""
    check: Check
    kind: DetectionKind
    residual_ratio: float
    """Residual ÷ threshold; infinite when the residual is not finite."""
    verdict: Verdict = Verdict.PENDING
    mended: bool = False
    """Whether the operation was repaired in place and verified again."""
    bit_exact: bool = False
    """Whether the repair is known to equal the fault-free result bit for bit (the same call again)."""
    caused_by: str | None = None
    """The detection that this one only propagates: its operation's inputs were bad already."""
    param: str | None = None
    """The parameter's name, where the alarm is about one."""
    detected_at: float = 0.0
    """Seconds since the Unix epoch."""
    latency_ms: float = 0.0
    """From the end of the faulty operation to the end of the check, or of the repair if there was one."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """All that the ranks of a job know about one attempt of one step, gathered on rank 0 for `Decide`."""

    run_id: str
    generation: int
    step: int
    attempt: int
    world_size: int
    detections: tuple[Detection, ...]
    """Of every rank, in rank order, the root causes first within a rank. Mended ones are included."""
    previous: tuple[Detection, ...] = ()
    """Unmended detections of the attempt before this one (empty at attempt 0)."""
    deterministic: bool | None = None
    """Whether this generation was measured to be bit-reproducible; None while unknown."""
    replay_available: bool = True
    replay_reason: str = ""
    """Why not, in words, where `replay_available` is false."""
    bit_equal: bool = False
    """Whether this attempt's local gradients equalled the previous attempt's on every rank: those of two replays bit
    for bit, those of the step itself by their norms, since no fingerprints are taken before the first alarm. A fault
    that is small beside the rest of its gradient may leave that norm as it is: this does not prove a false alarm.
    """
    rewind_step: int | None = None
    """Step of the newest memory snapshot that is known to be from before the damage, and whose steps since can be run
    again on every rank; None where there is none."""
    rewind_reason: str = ""
    """Why there is none, in words."""
    rewound_to: int | None = None
    """The snapshot that the attempt before this one went back to; None where it was no rewind."""
    num_rewinds: int = 0
    """Rewinds of this generation so far: steps that are run again after one are decided about anew."""
    loss_scale_search: bool = False
    """Whether the fp16 loss scaler is searching: non-finite gradients are then its business."""
    consecutive_skips: int = 0
    """Optimizer steps skipped in a row for non-finite gradients, outside the loss scaler's search."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What to do about one attempt of one step, or about one failure of processes, and why."""

    decision_id: str
    """`g<generation>-s<step>-a<attempt>` for a step, with `-w<rewinds>` before the attempt once the generation has
    rewound; `g<generation>-exit` for a failure of processes."""
    generation: int
    step: int
    attempt: int
    action: Action
    reason: str
    """One sentence that a person on call understands."""
    verdicts: tuple[tuple[str, Verdict], ...] = ()
    """(detection_id, verdict) for each detection that this decision settles."""
    evidence: tuple[str, ...] = ()
    """Detection ids, root causes first."""
    cordon: tuple[str, ...] = ()
    """Devices to take out of use."""
    exit_code: int | None = None
    """With `stop`: what the run ends with."""
    origin: Origin = Origin.COORDINATOR
    outcome: Outcome = Outcome.PENDING
    latency_ms: float = 0.0
    """From the first detection to the end of the execution."""
    lost_s: float = 0.0
    """Seconds of training that were thrown away or repeated."""
    decided_at: float = 0.0
    """Seconds since the Unix epoch."""
    rule: str = ""
    """The row of the policy table that applied; empty where none did."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """What a rank's heartbeat says of its training."""

    step: int
    """Last optimizer step that was taken (`global_steps`)."""
    micro_step: int = 0
    loss: float | None = None
    tokens_per_s: float | None = None
    step_seconds: float | None = None
    last_verified_step: int = 0
    num_checks: tuple[tuple[str, int], ...] = ()
    """(site, how many operations were checked since the start of the generation)."""
    abft_overhead_ratio: float | None = None
    """Time spent in checks ÷ time of the step, where it was sampled."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RankExit:
    """How a rank's process ended, as its agent saw it."""

    generation: int
    rank: int
    node: str
    device: str
    exit_code: int
    """As in `subprocess`: negative for a signal."""
    message: str = ""
    """Last line of the traceback, where the rank left one."""
    step: int = 0
    """The step that it was working on; 0 where none had begun or it is not known."""
    exited_at: float = 0.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Strike:
    """One strike of an injected fault: the ground truth that detections are held against."""

    strike_id: str
    """`f<index of the fault in the plan>-n<n-th strike of it>`: unique in a run."""
    step: int
    micro_step: int
    rank: int
    site: str
    layer: int
    kind: str
    struck_at: float
    """Seconds since the Unix epoch."""
    attempt: int = 0
    no_effect: bool = False
    """The strike changed no bit, or only elements that are masked."""
    relative_change: float | None = None
    """max|ΔY| ÷ rms(Y) of the struck tensor; None for faults of processes."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointFact:
    """A checkpoint was published, loaded, refused because it cannot be trusted, or doubted after it was published."""

    kind: CheckpointKind
    directory: str
    """The script's save_dir or load_dir."""
    tag: str
    step: int
    """Its step; 0 where it cannot be known."""
    generation: int
    """Generation that wrote it; 0 where it cannot be known."""
    last_verified_step: int
    """Newest verified-clean step when it was written."""
    reason: str = ""
    """With `refused` and `doubted`: what is wrong with it, in words."""
    seconds: float = 0.0
    """How long saving and hashing, or verifying and loading, took."""
    at: float = 0.0
    """Seconds since the Unix epoch."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotFact:
    """Something happened to a memory snapshot."""

    kind: SnapshotKind
    step: int
    generation: int
    """Generation that took it."""
    node: str
    """Whose part of it this is about; empty for all of it."""
    tier: str = "memory"
    """memory, peer (a copy or parity of another node's), or disk (flushed)."""
    world_size: int = 0
    num_bytes: int = 0
    """Of this node's part."""
    clean_through: int = 0
    """Newest step that was known to be clean when this was said."""
    redundancy: int = 0
    """Lost nodes that the others can make up for."""
    reason: str = ""
    """With `refused`: what is wrong with it, in words."""
    seconds: float = 0.0
    """How long training was blocked by taking it; for the other kinds how long that took."""
    at: float = 0.0
    """Seconds since the Unix epoch."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class OrderAnswer:
    """What became of an order that is answered: a snapshot on request."""

    directive_id: str
    """The order."""
    step: int = 0
    """The step after which it was carried out; 0 where it was not."""
    problem: str = ""
    """Why it was not, in words; empty where it was."""
    at: float = 0.0
    """Seconds since the Unix epoch."""
