"""Faults joined with what became of them."""

from __future__ import annotations

from typing import Any

from resilience.launch.outcome import join


def strike(name: str, **change: Any) -> dict[str, Any]:
    return {
        "strike_id": name,
        "step": 3,
        "micro_step": 0,
        "rank": 0,
        "site": "linear.out",
        "layer": 1,
        "kind": "inf",
        "struck_at": 10.0,
        "attempt": 0,
        "no_effect": False,
        "relative_change": None,
        **change,
    }


def detection(name: str, **change: Any) -> dict[str, Any]:
    return {
        "detection_id": name,
        "step": 3,
        "micro_step": 0,
        "attempt": 0,
        "rank": 0,
        "site": "linear.out",
        "layer": 1,
        "check": "checksum",
        "kind": "inf",
        "verdict": "transient",
        **change,
    }


def decision(name: str, *evidence: str, **change: Any) -> dict[str, Any]:
    return {
        "decision_id": name,
        "step": 3,
        "action": "replay",
        "reason": f"because of {name}",
        "evidence": [*evidence],
        "verdicts": {},
        "outcome": "succeeded",
        "latency_ms": 5.0,
        "lost_s": 1.0,
        **change,
    }


def report(strikes: list[Any], detections: list[Any], decisions: list[Any]) -> dict[str, Any]:
    return {"faults_injected": strikes, "detections": detections, "decisions": decisions}


def test_a_fault_its_detection_and_both_decisions_are_one_row() -> None:
    decisions = [
        decision("a0", "d1"),
        decision("a1", action="continue", verdicts={"d1": "transient"}, latency_ms=9.0, lost_s=0.5),
    ]
    (row,) = join(report([strike("f0-n0")], [detection("d1")], decisions))
    assert row.fault == "step 3, rank 0: inf in linear.out[1]"
    assert row.detected_by == "checksum, rank 0: inf in linear.out[1]"
    assert (row.decision, row.reason, row.outcome) == ("replay → continue", "because of a1", "succeeded")
    assert (row.latency_ms, row.lost_s, row.verdict, row.undetected) == (9.0, 1.5, "transient", False)


def test_each_of_two_faults_in_a_step_gets_its_own_detection() -> None:
    strikes = [strike("f0-n0"), strike("f1-n0", rank=1, site="gradient", kind="scale", struck_at=11.0)]
    detections = [detection("d2", rank=1, site="gradient", check="norm", kind="norm_spike"), detection("d1")]
    rows = join(report(strikes, detections, [decision("a0", "d1", "d2")]))
    assert [row.detected_by for row in rows] == [
        "checksum, rank 0: inf in linear.out[1]",
        "norm, rank 1: norm_spike in gradient",
    ]


def test_a_fault_that_nothing_saw_says_so_unless_it_changed_nothing() -> None:
    rows = join(report([strike("f0-n0"), strike("f1-n0", step=4, no_effect=True, struck_at=12.0)], [], []))
    assert [row.undetected for row in rows] == [True, False]
    assert rows[1].fault.endswith("(no effect)")
    assert rows[0].latency_ms is None


def test_a_detection_without_a_fault_is_a_row_of_its_own() -> None:
    rows = join(report([strike("f0-n0")], [detection("d1"), detection("d2", step=7)], [decision("a0", "d1")]))
    assert [(row.fault != "", row.detected_by != "") for row in rows] == [(True, True), (False, True)]


def test_detections_that_one_decision_settled_are_one_row() -> None:
    detections = [detection("d1"), detection("d2", layer=2), detection("d3", step=9)]
    rows = join(report([], detections, [decision("a0", "d1", "d2"), decision("a1", "d3", step=9)]))
    assert [row.detected_by for row in rows] == [
        "checksum, rank 0: inf in linear.out[1] (and 1 more)",
        "checksum, rank 0: inf in linear.out[1]",
    ]


def test_a_killed_process_is_found_at_the_step_before_and_never_taken_for_arithmetic() -> None:
    kill = strike("f2-n0", step=55, rank=1, site="process", kind="kill", layer=0)
    seen = detection("exit", step=54, rank=1, site="process", layer=-1, check="process", kind="exit")
    other = detection("d1", step=55, rank=1)
    rows = join(report([kill], [other, seen], [decision("g1-exit", "exit", action="restart")]))
    assert rows[0].fault == "step 55, rank 1: kill in process"
    assert rows[0].detected_by == "process, rank 1: exit in process"
    assert rows[0].decision == "restart"
    assert rows[1].fault == ""


def test_a_fault_that_strikes_again_on_replay_stays_one_row() -> None:
    strikes = [strike(f"f0-n{attempt}", attempt=attempt, struck_at=10.0 + attempt) for attempt in range(3)]
    detections = [detection(f"d{attempt}", attempt=attempt, verdict="persistent") for attempt in range(3)]
    decisions = [decision("a0", "d0"), decision("a1", "d1"), decision("a2", "d2", action="stop")]
    (row,) = join(report(strikes, detections, decisions))
    assert row.fault == "step 3, rank 0, 3 times: inf in linear.out[1]"
    assert row.detected_by.endswith("(and 2 more)")
    assert row.decision == "replay → replay → stop"
    assert row.verdict == "persistent"


def test_one_strike_takes_one_detection() -> None:
    detections = [detection("d1"), detection("d2", attempt=1)]
    rows = join(report([strike("f0-n0")], detections, [decision("a0", "d1"), decision("a1", "d2")]))
    assert [row.fault != "" for row in rows] == [True, False]


def test_a_decision_about_nothing_that_was_detected_is_told() -> None:
    (row,) = join(report([], [], [decision("g1-exit", action="restart")]))
    assert (row.fault, row.detected_by, row.decision) == ("", "", "restart")
