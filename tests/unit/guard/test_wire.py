"""What ranks exchange about a veto: JSON as bytes, nothing pickled, nothing lost."""

from __future__ import annotations

import math

import pytest

from resilience.events import Action, Check, Decision, Detection, DetectionKind, Evidence, Verdict
from resilience.guard.notes import Share
from resilience.guard.rewind import Offer
from resilience.guard.wire import decode, encode

DETECTION = Detection(
    detection_id="g1-r0-1",
    generation=1,
    step=3,
    micro_step=0,
    attempt=0,
    rank=0,
    node="a",
    device="gpu",
    site="linear.out",
    layer=2,
    check=Check.CHECKSUM,
    kind=DetectionKind.INF,
    residual_ratio=math.inf,
)


def test_evidence_and_decisions_come_back_as_they_were() -> None:
    offer = Offer(steps=(2, 3), problem="no more room", clean_step=-1, clean_through=2)
    assert decode(Offer, encode(offer)) == offer
    share = Share(detections=(DETECTION,), replay_problem="", bit_equal=False, state_clean_step=None)
    assert decode(Share, encode(share)) == share
    decision = Decision(
        decision_id="g1-s3-a0",
        generation=1,
        step=3,
        attempt=0,
        action=Action.REPLAY,
        reason="because",
        verdicts=(("g1-r0-1", Verdict.TRANSIENT),),
        evidence=("g1-r0-1",),
        exit_code=None,
    )
    assert decode(Decision, encode(decision)) == decision
    evidence = Evidence(
        run_id="r", generation=1, step=3, attempt=1, world_size=2, detections=(DETECTION,), previous=(DETECTION,)
    )
    assert decode(Evidence, encode(evidence)) == evidence


def test_what_is_something_else_is_refused() -> None:
    with pytest.raises(ValueError, match="not a"):
        decode(Decision, encode(DETECTION))
