"""What one rank saw in an attempt, and what it tells the others of it. Never here: communication, decisions."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

from resilience.abft.finding import Finding
from resilience.events import Check, Detection, DetectionKind, Evidence
from resilience.guard.screens import Reading

__all__ = ["NON_FINITE", "Flags", "Inspection", "Share", "clean_step_of", "waited_ms", "wish"]

NON_FINITE = frozenset({DetectionKind.INF, DetectionKind.NAN, DetectionKind.NEAR_INF})

_OF_STATE = frozenset({"weight", "optimizer"})


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """What one rank saw in one attempt."""

    detections: tuple[Detection, ...]
    findings: tuple[Finding, ...]
    readings: tuple[Reading, ...]
    fingerprints: tuple[int, ...]
    replay_problem: str
    """Why the step cannot be run again; empty where it can."""
    num_differences: int = 0
    """Pieces of state that are not what they were, to be settled with the other ranks."""

    @property
    def state_clean_step(self) -> int | None:
        """Newest step whose snapshot is free of what was found in the state, mended or not: −1 where that is not known,
        None where nothing was."""
        return clean_step_of(finding for finding in self.findings if finding.site in _OF_STATE)

    def equals(self, other: Inspection) -> bool:
        """Whether both attempts gave the same local gradients: by fingerprints where both have them, else by norms."""
        if self.fingerprints and other.fingerprints:
            return self.fingerprints == other.fingerprints
        return self.has_norms_of(other)

    def has_norms_of(self, other: Inspection) -> bool:
        """Whether both attempts gave local gradients of exactly the same norms."""
        # NaN is not equal to itself, but its text is.
        return repr(self.readings) == repr(other.readings)

    def has_norms_like(self, other: Inspection) -> bool:
        """Whether both attempts gave local gradients of about the same norms, as non-deterministic kernels do."""
        return len(self.readings) == len(other.readings) and all(
            (a.micro_step, a.index) == (b.micro_step, b.index)
            and math.isclose(a.norm, b.norm, rel_tol=0.1, abs_tol=1e-6)
            for a, b in zip(self.readings, other.readings, strict=True)
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What a rank puts into the evidence of an attempt."""

    detections: tuple[Detection, ...]
    replay_problem: str
    bit_equal: bool
    state_clean_step: int | None
    """As in `Inspection`."""


@dataclasses.dataclass(frozen=True, slots=True)
class Flags:
    """The reduction at the boundary: the largest over all ranks."""

    veto: int
    differences: int
    mended: int
    unrepeatable: int
    scaler_skips: int
    stop_code: int
    restart: int
    fenced: int
    drain: int
    rewind: int
    snapshot: int
    no_snapshot: int
    snapshot_not_due: int
    snapshots_off: int
    """Whether some rank takes none any more."""
    lost_snapshot: int
    """Step of a snapshot that is not whole on some rank; 0 where there is none."""
    unmeasured: int
    """Whether some rank does not know if replays are bit-equal."""


def clean_step_of(findings: Iterable[Finding]) -> int | None:
    """The newest step whose snapshot is free of all of them; −1 where one does not say, None where there are none."""
    return min((-1 if each.clean_step is None else each.clean_step for each in findings), default=None)


def wish(now: float) -> Finding:
    """An operator's order to rewind, as an alarm; `now` in seconds since the Unix epoch."""
    return Finding(
        site="operator",
        layer=-1,
        check=Check.OPERATOR,
        kind=DetectionKind.MISMATCH,
        residual_ratio=math.inf,
        detected_at=now,
    )


def waited_ms(evidence: Evidence, now: float) -> float:
    """From the first detection to now."""
    seen = [detection.detected_at for detection in (*evidence.previous, *evidence.detections) if detection.detected_at]
    return max(0.0, now - min(seen)) * 1e3 if seen else 0.0
