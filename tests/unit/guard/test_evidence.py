"""From findings to detections: which alarm is the cause, which only follows, and what the loss scaler may keep."""

from __future__ import annotations

from typing import Any

from resilience.abft.finding import Finding
from resilience.events import Check, DetectionKind, Verdict
from resilience.guard.evidence import DetectionFactory, is_root, scaler_will_skip


def factory() -> DetectionFactory:
    return DetectionFactory(generation=2, rank=1, node="a", device="gpu-1")


def finding(site: str = "linear.out", kind: DetectionKind = DetectionKind.MISMATCH, **fields: Any) -> Finding:
    check = Check.SCREEN if site == "gradient" else Check.CHECKSUM
    return Finding(**{"site": site, "layer": 0, "check": check, "kind": kind, "residual_ratio": 9.0, **fields})


def test_identities_are_unique_over_steps() -> None:
    maker = factory()
    first = maker.make([finding()], step=1, attempt=0)
    second = maker.make([finding()], step=2, attempt=0)
    assert [d.detection_id for d in first + second] == ["g2-r1-1", "g2-r1-2"]
    assert (second[0].step, second[0].rank, second[0].device) == (2, 1, "gpu-1")


def test_what_follows_the_first_unmended_alarm_is_caused_by_it() -> None:
    made = factory().make(
        [
            finding(mended=True),
            finding(layer=1, kind=DetectionKind.INF),
            finding(layer=2, kind=DetectionKind.NAN, inputs_bad=True),
            finding("gradient", DetectionKind.NAN),
        ],
        step=3,
        attempt=0,
    )
    mended, root, *rest = made
    assert is_root(mended)
    assert is_root(root)
    assert [d.caused_by for d in rest] == [root.detection_id] * 2
    assert {d.verdict for d in rest} == {Verdict.PROPAGATED}


def test_a_second_fault_is_a_cause_of_its_own() -> None:
    made = factory().make([finding(), finding(layer=3)], step=3, attempt=0)
    assert all(is_root(d) for d in made)


def test_a_gradient_alarm_after_a_mended_fault_stands_for_itself() -> None:
    made = factory().make([finding(mended=True), finding("gradient", DetectionKind.INF)], step=3, attempt=0)
    assert all(is_root(d) for d in made)


def test_bad_inputs_from_the_data_blame_no_device() -> None:
    made = factory().make(
        [finding(kind=DetectionKind.NAN, inputs_bad=True), finding("gradient", DetectionKind.NAN)], step=3, attempt=0
    )
    assert made[0].check is Check.SCREEN
    assert made[1].caused_by == made[0].detection_id


def test_propagated_alarms_are_bounded() -> None:
    findings = [finding("gradient", DetectionKind.NAN, layer=index) for index in range(500)]
    made = factory().make(findings, step=3, attempt=0)
    assert len(made) == 16
    assert sum(is_root(d) for d in made) == 1


def test_the_scaler_skips_what_overflowed_all_the_way() -> None:
    overflow = finding("gradient", DetectionKind.INF)
    assert scaler_will_skip([overflow])
    assert scaler_will_skip([finding("linear.dgrad", DetectionKind.INF), overflow])
    assert scaler_will_skip([finding(mended=True), overflow]), "what was mended is settled already"
    assert not scaler_will_skip([finding("linear.dgrad", DetectionKind.INF)]), "the step would not be skipped"
    assert not scaler_will_skip([finding(), overflow]), "a mismatch is no overflow"
    assert not scaler_will_skip([])
