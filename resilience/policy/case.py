"""One question to the table: the evidence of one attempt, with what follows from it. Pure; no decisions here."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from functools import cached_property

from resilience.config import PolicyConfig
from resilience.events import Check, Detection, DetectionKind, Evidence, Verdict

__all__ = ["ARITHMETIC", "FORWARD_SITES", "NON_FINITE", "Case", "describe", "is_damage"]

ARITHMETIC = frozenset({Check.CHECKSUM, Check.INVARIANT})
"""Checks of arithmetic: they know what the result of finite inputs must be, so they blame the device."""

_KNOWING = ARITHMETIC | {Check.REPLICA}
"""Checks that no data can set off. What ranks must have alike blames no device: it does not say whose is wrong."""

OF_STATE = frozenset({Check.AT_REST, Check.REPLICA, Check.SCREEN})
"""Checks of what is kept between the steps: is it still what was written, and is it finite?"""

STATE_SITES = frozenset({"weight", "optimizer"})

NON_FINITE = frozenset({DetectionKind.INF, DetectionKind.NAN, DetectionKind.NEAR_INF})

FORWARD_SITES = frozenset(
    {f"attention.{name}" for name in ("q", "k", "v", "scores", "probs", "context", "out")} | {"linear.out"}
)
"""Sites that the loss scale does not reach: a forward overflow is not the scale search's business."""


@dataclasses.dataclass(frozen=True)
class Case:
    """`evidence` under `limits`, with what the conditions of the table ask about it."""

    evidence: Evidence
    limits: PolicyConfig
    restarts_left: int
    spares: tuple[str, ...] = ()
    """Nodes that wait and could take the places of those with a device that fails again and again."""

    @cached_property
    def alarms(self) -> tuple[Detection, ...]:
        """Unmended root causes. An alarm whose cause was mended, or is not known, counts as a cause itself."""
        unmended = (d for d in self.evidence.detections if not d.mended and d.check is not Check.OPERATOR)
        return tuple(d for d in unmended if not self._is_propagated(d))

    @cached_property
    def is_ordered(self) -> bool:
        """Whether an operator asks for a rewind."""
        return any(d.check is Check.OPERATOR for d in self.evidence.detections)

    @cached_property
    def mended(self) -> tuple[Detection, ...]:
        return tuple(d for d in self.evidence.detections if d.mended)

    @cached_property
    def propagated(self) -> tuple[Detection, ...]:
        return tuple(d for d in self.evidence.detections if not d.mended and self._is_propagated(d))

    @cached_property
    def unmended_ids(self) -> frozenset[str]:
        return frozenset(d.detection_id for d in self.evidence.detections if not d.mended)

    def _is_propagated(self, detection: Detection) -> bool:
        return detection.caused_by is not None and detection.caused_by in self.unmended_ids

    @property
    def is_first_attempt(self) -> bool:
        return self.evidence.attempt == 0

    @property
    def may_replay(self) -> bool:
        left = self.evidence.attempt < self.limits.max_replays_per_step
        is_settled = self.state_is_damaged or (self.loss_spiked and self.is_deterministic)
        return self.evidence.replay_available and left and not is_settled

    @property
    def may_restart(self) -> bool:
        return self.restarts_left > 0

    @property
    def may_rewind(self) -> bool:
        """Whether there is a snapshot from before. The ranks have weighed what rules one out, their budget among it."""
        return self.evidence.rewind_step is not None

    @cached_property
    def state_is_damaged(self) -> bool:
        """Whether weights or optimizer state are wrong and could not be rebuilt: a replay would start from them."""
        return any(is_damage(d) for d in self.alarms)

    @cached_property
    def loss_spiked(self) -> bool:
        """Whether a loss far above those before it is all that is wrong."""
        return bool(self.alarms) and all(d.check is Check.LOSS for d in self.alarms)

    @cached_property
    def loss_spiked_again(self) -> bool:
        """Whether it is the same on replay, so that the weights or the data are at fault and not the iteration."""
        return self.loss_spiked and not self.may_replay

    @cached_property
    def all_non_finite(self) -> bool:
        return bool(self.alarms) and all(d.kind in NON_FINITE for d in self.alarms)

    @cached_property
    def any_non_finite(self) -> bool:
        return any(d.kind in NON_FINITE for d in self.alarms)

    @cached_property
    def is_scale_search(self) -> bool:
        """Overflow of scaled gradients while the loss scaler looks for its scale."""
        return (
            self.evidence.loss_scale_search
            and self.all_non_finite
            and not any(d.site in FORWARD_SITES for d in self.alarms)
        )

    @cached_property
    def only_screens(self) -> bool:
        """Whether nothing but screens of values alarmed: they cannot tell broken hardware from bad data."""
        return bool(self.alarms) and not any(d.check in _KNOWING for d in self.alarms) and not self.state_is_damaged

    @cached_property
    def same_address(self) -> bool:
        """Whether the replay alarmed at exactly the addresses of the attempt before."""
        return bool(self.alarms) and set(map(_address, self.alarms)) == set(map(_address, self._previous_roots))

    @cached_property
    def is_deterministic(self) -> bool:
        """The same screens alarmed again, where equal inputs are known to give equal results."""
        known = self.evidence.deterministic is True or self.evidence.bit_equal
        return not self.is_first_attempt and self.only_screens and self.same_address and known

    @cached_property
    def skips_exhausted(self) -> bool:
        return self.evidence.consecutive_skips >= self.limits.max_skips_in_a_row

    @cached_property
    def repeat_offenders(self) -> tuple[str, ...]:
        """Devices on which a check of arithmetic failed in this attempt and in the one before, in rank order."""
        before = {d.device for d in self.evidence.previous if d.check in ARITHMETIC}
        now = (d.device for d in self.alarms if d.check in ARITHMETIC)
        return tuple(dict.fromkeys(device for device in now if device in before))

    @cached_property
    def _previous_roots(self) -> tuple[Detection, ...]:
        ids = {d.detection_id for d in self.evidence.previous}
        return tuple(d for d in self.evidence.previous if d.caused_by is None or d.caused_by not in ids)

    def settle(self, verdict: Verdict, detections: Iterable[Detection]) -> tuple[tuple[str, Verdict], ...]:
        return tuple((d.detection_id, verdict) for d in detections)


def is_damage(detection: Detection) -> bool:
    """Whether it says that weights or optimizer state are not what was written; mended or not."""
    return detection.check in OF_STATE and detection.site in STATE_SITES


def _address(detection: Detection) -> tuple[object, ...]:
    d = detection
    return (d.rank, d.step, d.micro_step, d.site, d.layer, d.param, d.kind)


def describe(detections: tuple[Detection, ...]) -> str:
    """The first of `detections` in words, and how many more there are."""
    assert detections, "nothing to describe"
    first = detections[0]
    layer = f", layer {first.layer}" if first.layer >= 0 else ""
    # Optimizer state is named in full: "master of …".
    param = f", {'' if first.site == 'optimizer' else 'parameter '}{first.param}" if first.param else ""
    others = f", and {len(detections) - 1} more" if len(detections) > 1 else ""
    return (
        f"{first.check} alarm ({first.kind}) in {first.site}{layer}{param}, micro-step {first.micro_step},"
        f" on rank {first.rank} ({first.device}){others}"
    )
