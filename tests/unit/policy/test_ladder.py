"""One attempt of one step: which row applies, what it says, and what must never come out."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from resilience.config import PolicyConfig
from resilience.events import Action, Check, DetectionKind, Mode, Origin, Outcome, Verdict
from resilience.policy import RULES, decide, decide_locally, judge
from resilience.testing import detection, evidence

LIMITS = PolicyConfig()
NOW = 100.0

ABFT = detection(step=5, rank=1, number=1)
ABFT_AGAIN = dataclasses.replace(ABFT, detection_id="g1-r1-2", attempt=1)
NAN = detection(step=5, number=1, site="gradient", layer=-1, check=Check.SCREEN, kind=DetectionKind.NAN, param="w")
NAN_AGAIN = dataclasses.replace(NAN, detection_id="g1-r0-2", attempt=1)
NAN_ELSEWHERE = dataclasses.replace(NAN_AGAIN, param="v")
SPIKE = dataclasses.replace(NAN, check=Check.NORM, kind=DetectionKind.NORM_SPIKE)
SPIKE_AGAIN = dataclasses.replace(SPIKE, detection_id="g1-r0-2", attempt=1)
OVERFLOW = dataclasses.replace(NAN, kind=DetectionKind.INF)
REST = dataclasses.replace(ABFT, site="optimizer", layer=-1, check=Check.AT_REST, param="master of w")
ORDER = dataclasses.replace(ABFT, site="operator", layer=-1, check=Check.OPERATOR)
LOSS = dataclasses.replace(ABFT, site="loss", layer=-1, check=Check.LOSS, kind=DetectionKind.LOSS_SPIKE)
LOSS_AGAIN = dataclasses.replace(LOSS, detection_id="g1-r1-2", attempt=1)
NAN_WEIGHT = dataclasses.replace(NAN, site="weight", param="w")
FORWARD_INF = dataclasses.replace(OVERFLOW, site="attention.scores", layer=1)


def ask(*found: Any, attempt: int = 0, left: int | None = None, spares: tuple[str, ...] = (), **known: Any) -> Any:
    asked = evidence(*found, step=5, attempt=attempt, **known)
    return judge(asked, LIMITS, now=NOW, restarts_left=left, spares=spares)


CASES = [
    ("ordered-rewind", Action.REWIND, None, ask(ORDER, rewind_step=3)),
    ("ordered-rewind", Action.REWIND, None, ask(ORDER, REST, rewind_step=3)),
    ("order-refused", Action.CONTINUE, None, ask(ORDER, rewind_reason="no snapshot is clean yet")),
    # An order that cannot be carried out must not hide what is wrong besides.
    ("replay", Action.REPLAY, None, ask(ORDER, dataclasses.replace(ABFT, detection_id="g1-r1-7"))),
    ("rewound-clean", Action.CONTINUE, None, ask(attempt=1, previous=[ORDER], rewound_to=3)),
    ("rewound-clean", Action.CONTINUE, None, ask(attempt=1, previous=[REST], rewound_to=3)),
    ("rewind", Action.REWIND, None, ask(REST, rewind_step=3)),
    ("rewind", Action.REWIND, None, ask(NAN_WEIGHT, rewind_step=3)),
    ("state-damaged", Action.RESTART, None, ask(REST, rewind_reason="the history does not reach back")),
    ("replay", Action.REPLAY, None, ask(LOSS, rewind_step=3)),
    ("loss-rewind", Action.REWIND, None, ask(LOSS, rewind_step=3, replay_available=False)),
    ("loss-rewind", Action.REWIND, None, ask(LOSS_AGAIN, attempt=1, previous=[LOSS], bit_equal=True, rewind_step=3)),
    ("loss-rewind", Action.REWIND, None, ask(LOSS_AGAIN, attempt=2, previous=[LOSS], rewind_step=3)),
    ("loss-spike", Action.CONTINUE, None, ask(LOSS_AGAIN, attempt=2, previous=[LOSS])),
    ("loss-spike", Action.CONTINUE, None, ask(LOSS, replay_available=False, left=0)),
    ("clean", Action.CONTINUE, None, ask()),
    ("mended", Action.CORRECTED, None, ask(dataclasses.replace(ABFT, mended=True))),
    ("replay", Action.REPLAY, None, ask(ABFT)),
    ("replay", Action.REPLAY, None, ask(NAN, deterministic=True)),
    ("replayed-clean", Action.CONTINUE, None, ask(attempt=1, previous=[ABFT])),
    (
        "replayed-clean",
        Action.CONTINUE,
        None,
        ask(dataclasses.replace(ABFT_AGAIN, mended=True), attempt=1, previous=[NAN]),
    ),
    ("scale-search", Action.CONTINUE, None, ask(OVERFLOW, loss_scale_search=True)),
    ("scale-search", Action.CONTINUE, None, ask(OVERFLOW, loss_scale_search=True, replay_available=False)),
    # The loss scale does not reach the forward, and a finite error is not an overflow.
    ("replay", Action.REPLAY, None, ask(FORWARD_INF, loss_scale_search=True)),
    ("replay", Action.REPLAY, None, ask(ABFT, loss_scale_search=True)),
    ("data-non-finite", Action.CONTINUE, None, ask(NAN_AGAIN, attempt=1, previous=[NAN], deterministic=True)),
    ("data-non-finite", Action.CONTINUE, None, ask(NAN_AGAIN, attempt=1, previous=[NAN], bit_equal=True)),
    ("data-finite", Action.CONTINUE, None, ask(SPIKE_AGAIN, attempt=1, previous=[SPIKE], deterministic=True)),
    # Another address, or an arithmetic check among them, is no proof of bad data.
    ("replay", Action.REPLAY, None, ask(NAN_ELSEWHERE, attempt=1, previous=[NAN], deterministic=True)),
    ("replay", Action.REPLAY, None, ask(ABFT_AGAIN, attempt=1, previous=[ABFT], deterministic=True)),
    ("replay", Action.REPLAY, None, ask(NAN_AGAIN, attempt=1, previous=[NAN], deterministic=False)),
    (
        "data-skips-exhausted",
        Action.STOP,
        93,
        ask(NAN_AGAIN, attempt=1, previous=[NAN], deterministic=True, consecutive_skips=5),
    ),
    ("persistent", Action.STOP, 75, ask(ABFT_AGAIN, attempt=2, previous=[ABFT], deterministic=True)),
    ("persistent-spare", Action.RESTART, None, ask(ABFT_AGAIN, attempt=2, previous=[ABFT], spares=("c",))),
    ("persistent", Action.STOP, 75, ask(ABFT_AGAIN, attempt=2, previous=[ABFT], spares=("c",), left=0)),
    ("unmeasured-non-finite", Action.CONTINUE, None, ask(NAN_AGAIN, attempt=2, previous=[NAN])),
    ("unmeasured-finite", Action.CONTINUE, None, ask(SPIKE_AGAIN, attempt=2, previous=[SPIKE])),
    ("skips-exhausted", Action.STOP, 93, ask(NAN_AGAIN, attempt=2, previous=[NAN], consecutive_skips=5)),
    ("restart", Action.RESTART, None, ask(ABFT, replay_available=False, replay_reason="pipeline")),
    ("restart", Action.RESTART, None, ask(NAN_ELSEWHERE, attempt=2, previous=[NAN])),
    ("nothing-left", Action.STOP, 75, ask(ABFT, replay_available=False, left=0)),
    ("mended", Action.CORRECTED, None, ask(dataclasses.replace(REST, site="weight", mended=True))),
    ("state-damaged", Action.RESTART, None, ask(REST)),
    ("state-damaged", Action.RESTART, None, ask(NAN, REST, deterministic=True)),
    ("state-damaged", Action.RESTART, None, ask(REST, attempt=1, previous=[REST], deterministic=True)),
    ("nothing-left", Action.STOP, 75, ask(REST, left=0)),
    # What was computed from a weight that has been rebuilt since is run again.
    ("replay", Action.REPLAY, None, ask(dataclasses.replace(REST, site="gradient"))),
]


@pytest.mark.parametrize(
    ("rule", "action", "exit_code", "ruling"), CASES, ids=[f"{i}-{c[0]}" for i, c in enumerate(CASES)]
)
def test_the_row_that_applies(rule: str, action: Action, exit_code: int | None, ruling: Any) -> None:
    decision = ruling.decision
    assert (decision.rule, decision.action, decision.exit_code) == (rule, action, exit_code)
    assert decision.decision_id == f"g1-s5-a{decision.attempt}"
    assert decision.decided_at == NOW


def test_every_row_is_reached_by_a_case() -> None:
    assert {case[0] for case in CASES} == {rule.name for rule in RULES}


def test_a_persistent_fault_cordons_the_device_and_says_so() -> None:
    decision = ask(ABFT_AGAIN, attempt=2, previous=[ABFT]).decision
    assert decision.cordon == ("device-1",)
    assert "device-1 computes wrongly" in decision.reason
    assert dict(decision.verdicts) == {"g1-r1-1": Verdict.PERSISTENT, "g1-r1-2": Verdict.PERSISTENT}


@pytest.mark.parametrize(
    ("left", "why"),
    [(1, "c, a spare node, takes the place of its node"), (0, "a spare node waits, but the budget of")],
)
def test_with_a_spare_node_the_run_goes_on_without_the_device(left: int, why: str) -> None:
    decision = ask(ABFT_AGAIN, attempt=2, previous=[ABFT], spares=("c",), left=left).decision
    assert decision.cordon == ("device-1",)
    assert why in decision.reason
    assert dict(decision.verdicts) == {"g1-r1-1": Verdict.PERSISTENT, "g1-r1-2": Verdict.PERSISTENT}


def test_a_device_is_not_blamed_for_what_another_one_did() -> None:
    elsewhere = dataclasses.replace(ABFT_AGAIN, rank=0, device="device-0")
    decision = ask(elsewhere, attempt=2, previous=[ABFT]).decision
    assert (decision.rule, decision.cordon) == ("restart", ())


def test_a_clean_replay_settles_what_was_seen_before() -> None:
    assert dict(ask(attempt=1, previous=[ABFT]).decision.verdicts) == {"g1-r1-1": Verdict.TRANSIENT}


def test_an_alarm_that_only_propagates_is_not_a_root() -> None:
    after = dataclasses.replace(NAN, detection_id="g1-r1-9", caused_by="g1-r1-1")
    decision = ask(ABFT, after).decision
    assert decision.evidence == ("g1-r1-1", "g1-r1-9")
    assert dict(decision.verdicts) == {"g1-r1-9": Verdict.PROPAGATED}


def test_an_alarm_whose_cause_was_mended_vetoes_the_step() -> None:
    mended = dataclasses.replace(ABFT, mended=True)
    after = dataclasses.replace(NAN, detection_id="g1-r1-9", caused_by="g1-r1-1")
    assert ask(mended, after).decision.action is Action.REPLAY


def test_cheaper_rungs_that_were_ruled_out_are_named() -> None:
    ruling = ask(ABFT, replay_available=False, replay_reason="several engines share the step", left=0)
    text = "\n".join(ruling.considered)
    assert "replay: off, several engines share the step" in text
    assert "budget of 3 restarts is used up" in text
    assert ask().considered == ()


def test_shadow_mode_says_what_it_would_have_done_and_does_nothing() -> None:
    decision = decide(evidence(ABFT, step=5), LIMITS, Mode.SHADOW, now=NOW)
    assert (decision.action, decision.outcome, decision.rule) == (Action.CONTINUE, Outcome.SHADOWED, "replay")
    assert "would have been replay" in decision.reason
    stopped = decide(evidence(ABFT_AGAIN, step=5, attempt=2, previous=[ABFT]), LIMITS, Mode.SHADOW, now=NOW)
    assert (stopped.exit_code, stopped.cordon) == (None, ())


@pytest.mark.parametrize(
    ("found", "attempt", "action"),
    [
        (ABFT, 0, Action.REPLAY),
        (dataclasses.replace(ABFT, mended=True), 0, Action.CORRECTED),
        (ABFT_AGAIN, 2, Action.CONTINUE),
    ],
)
def test_on_its_own_word_a_rank_takes_only_local_rungs(found: Any, attempt: int, action: Action) -> None:
    previous = [ABFT] if attempt else []
    decision = decide_locally(evidence(found, step=5, attempt=attempt, previous=previous), LIMITS, now=NOW)
    assert (decision.action, decision.origin) == (action, Origin.RANK)
    assert "no coordinator answered" in decision.reason
    assert (decision.exit_code, decision.cordon) == (None, ())


@st.composite
def cases(draw: st.DrawFn) -> Any:
    attempt = draw(st.integers(0, 4))

    def alarms(of_attempt: int) -> st.SearchStrategy[Any]:
        return st.lists(
            st.builds(
                detection,
                step=st.just(5),
                rank=st.integers(0, 1),
                number=st.integers(10 * of_attempt, 10 * of_attempt + 9),
                attempt=st.just(of_attempt),
                site=st.sampled_from(["linear.out", "gradient", "optimizer", "loss"]),
                check=st.sampled_from([*Check]),
                kind=st.sampled_from(list(DetectionKind)[:5]),
                mended=st.booleans(),
            ),
            max_size=3,
            unique_by=lambda d: d.detection_id,
        )

    known: dict[str, Any] = {
        "rewind_step": draw(st.sampled_from([None, 3])),
        "rewound_to": draw(st.sampled_from([None, 2])) if attempt else None,
        "num_rewinds": draw(st.integers(0, 1)),
        "deterministic": draw(st.sampled_from([None, True, False])),
        "replay_available": draw(st.booleans()),
        "bit_equal": draw(st.booleans()),
        "loss_scale_search": draw(st.booleans()),
        "consecutive_skips": draw(st.integers(0, 7)),
        "previous": draw(alarms(attempt - 1)) if attempt else (),
    }
    return evidence(*draw(alarms(attempt)), step=5, attempt=attempt, **known), draw(st.integers(0, 3))


# A loaded machine is no failure of the table.
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(cases())
def test_whatever_the_evidence(case: Any) -> None:
    found, left = case
    decision = decide(found, LIMITS, now=NOW, restarts_left=left)
    assert decision.reason
    assert decision == decide(found, LIMITS, now=NOW, restarts_left=left), "the same question has the same answer"
    if decision.action is Action.REPLAY:
        assert found.replay_available
        assert found.attempt < LIMITS.max_replays_per_step, "replays end"
    if decision.action is Action.RESTART:
        assert left > 0
    if decision.action is Action.REWIND:
        assert found.rewind_step is not None, "there is something to go back to"
    assert (decision.exit_code is not None) == (decision.action is Action.STOP)
    assert not decision.cordon or decision.action is Action.STOP
    ids = {d.detection_id for d in (*found.detections, *found.previous)}
    assert {name for name, _ in decision.verdicts} <= ids
    arithmetic = [d for d in found.detections if d.check is Check.CHECKSUM and not d.mended]
    if arithmetic and not found.loss_scale_search:
        assert decision.action not in (Action.CONTINUE, Action.CORRECTED), (
            "a failed check of arithmetic is never waved through"
        )


def test_damaged_state_is_named_and_no_replay_is_considered() -> None:
    ruling = ask(REST)
    assert "master of w" in ruling.decision.reason
    assert "restart from the newest snapshot or checkpoint" in ruling.decision.reason
    assert "rewind: no memory snapshot is kept" in ruling.considered
    assert any("same damaged state" in text for text in ruling.considered)


def test_a_rewind_says_from_where_it_goes_on_and_what_is_run_again() -> None:
    reason = ask(REST, rewind_step=2).decision.reason
    assert "the memory snapshot of step 2 is loaded and steps 3 to 5 are run again" in reason
    assert "step 5 is run again" in ask(REST, rewind_step=4).decision.reason
    assert any("same damaged state" in text for text in ask(REST, rewind_step=2).considered)


def test_why_there_is_no_rewind_is_said() -> None:
    ruling = ask(REST, rewind_reason="the history of rank 1 begins with step 4")
    assert "the history of rank 1 begins with step 4" in ruling.decision.reason
    assert "rewind: the history of rank 1 begins with step 4" in ruling.considered
    assert "rewind: nothing wrong was committed" in "\n".join(ask(ABFT, replay_available=False).considered)


def test_what_is_run_again_after_a_rewind_is_another_question() -> None:
    assert ask(ABFT, num_rewinds=2).decision.decision_id == "g1-s5-w2-a0"


def test_an_operators_rewind_is_no_alarm_of_a_device() -> None:
    assert ask(ORDER, rewind_step=3).decision.verdicts == ()
