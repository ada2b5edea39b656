"""The page of every kind of run: clean, struck thousands of times, broken off, of another version, hostile."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from resilience.report_page.gather import Device, Samples
from resilience.report_page.model import Report

from .conftest import BEGAN, Draw, alarm, decision, report


def test_a_clean_run(draw: Draw) -> None:
    page = draw(report())
    assert "No alarm was raised." in page.text
    assert "Nothing was repaired, so nothing was changed." in page.text
    assert page.with_class("headline")[0]["class"] == "headline good"
    assert page.with_class("mark") == []


def test_the_page_needs_nothing_and_runs_nothing(draw: Draw) -> None:
    page = draw(report(detections=[alarm(3)], decisions=[decision(3)]))
    assert page.tags["script"] == 0
    assert page.tags["title"] > 1, "tooltips"
    (policy,) = (a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")
    addresses = [a[name] for _, a in page.elements for name in ("href", "src") if name in a]
    assert all(address.startswith(("#", "data:")) for address in addresses)
    assert "url(" not in page.source
    assert "@import" not in page.source
    for tag, attributes in page.elements:
        assert not any(name.startswith("on") for name in attributes), tag


def test_five_thousand_alarms_are_summed_up(draw: Draw) -> None:
    alarms = [
        alarm(n // 10 + 1, site=f"site.{n % 40}", kind=f"kind{n % 12}", device=f"device-{n % 200}", rank=n % 200)
        for n in range(5000)
    ]
    decisions = [decision(n + 1) for n in range(3000)]
    decisions[17] = decision(18, "rewind", reason="the one that mattered")
    page = draw(report(num_steps=500, detections=alarms, decisions=decisions))
    assert len(page.source) < 250_000
    marks = page.with_class("mark")
    by_lane = {sign: sum(int(m["data-count"]) for m in marks if m["data-sign"] == sign) for sign in ("mended",)}
    assert by_lane == {"mended": 5000}
    assert sum(int(m["data-count"]) for m in marks) == 8000
    assert len(marks) <= 2 * 51
    assert len(page.with_class("decision")) == 120
    assert page.text.index("the one that mattered") < page.text.index("100 lighter or older ones")
    assert "2,880 more are told" in page.text
    assert "5,000 alarms, 5,000 mended in place." in page.text
    assert "80 more devices" in page.text


def test_a_run_that_goes_on_and_one_that_was_never_heard_of_again(draw: Draw) -> None:
    unfinished = report(exit_code=None, finished_at=None, outcome="running", reason="")
    assert "Running" in draw(unfinished, is_live=True).text
    assert "Ended without a word" in draw(unfinished).text


@pytest.mark.parametrize(
    ("code", "state", "advice"),
    [
        (75, "Stopped, requeue", "Requeue the job"),
        (93, "Stopped, do not requeue", "Do not requeue the job"),
        (1, "Failed with exit code 1", ""),
    ],
)
def test_how_it_ended_and_what_to_do(draw: Draw, code: int, state: str, advice: str) -> None:
    page = draw(report(exit_code=code, outcome="whatever", reason="of the weather"))
    assert state in page.text
    assert advice in page.text
    assert "It ended because of the weather." in page.text


def test_the_device_to_pull_stands_in_the_headline(draw: Draw) -> None:
    devices = {
        "gpu-7": Device("gpu-7", "b", ranks={7}, cordoned=True, reason="it failed twice", num_faults_ever=9),
        "gpu-8": Device("gpu-8", "b", ranks={8}, num_faults_ever=0),
        "gpu-9": Device("gpu-9", "c", cordoned=True, reason="out of use since last week"),
    }
    decisions = [
        decision(3, "quarantine", cordon=["gpu-7"]),
        decision(4, "quarantine", cordon=["gpu-8"]),  # and put back since
    ]
    page = draw(report(decisions=decisions), devices=devices)
    assert "Pull gpu-7 (node b): it failed twice." in page.text
    assert "Pull gpu-8" not in page.text
    assert "Pull gpu-9" not in page.text
    assert page.with_class("headline")[0]["class"] == "headline warn"
    assert page.text.index("out of use", page.text.index("all jobs")) < page.text.index("in use"), "those first"
    alone = draw(report(decisions=decisions[:1]))
    assert "Pull gpu-7: because of step 3." in alone.text, "also where only report.json is left"


def test_a_lost_node_stands_in_the_headline(draw: Draw) -> None:
    devices = {"d0": Device("d0", "a", ranks={0}), "d1": Device("d1", "b", ranks={1}, is_lost=True)}
    assert "Look at node b: its agent was given up." in draw(report(), devices=devices).text


@pytest.mark.parametrize(
    ("fields", "answer", "ground"),
    [
        ({"detections": [alarm(3)], "decisions": [decision(3)]}, "Yes, by the record", "making the same call again"),
        ({"detections": [alarm(3, bit_exact=False)]}, "Something speaks against it", "rebuilt from checksums"),
        ({"deterministic": False}, "Something speaks against it", "gave different bits"),
        ({"deterministic": None, "decisions": [decision(3, "replay")]}, "cannot be told", "was not measured"),
        ({"detections": [alarm(3, mended=False, verdict="pending")]}, "cannot be told", "1 alarm has no verdict"),
        ({"decisions": [decision(3, outcome="shadowed")]}, "Something speaks against it", "only noted"),
        (
            {"generations": [{"generation": 1, "world_size": 4}, {"generation": 2, "world_size": 3}]},
            "Something speaks against it",
            "3 ranks instead of 4",
        ),
        (
            {"faults_injected": [{"step": 5, "rank": 0, "struck_at": BEGAN + 45}]},
            "cannot be told",
            "struck and no check told of it",
        ),
        ({"faults_injected": [{"step": 5, "no_effect": True}]}, "Nothing was repaired", "no effect, nothing to see"),
    ],
)
def test_whether_it_is_bit_identical(draw: Draw, fields: dict[str, Any], answer: str, ground: str) -> None:
    page = draw(report(**fields))
    assert answer in page.text
    assert ground in page.text


def test_damage_to_the_state_is_found_at_a_later_step(draw: Draw) -> None:
    struck = {"step": 5, "rank": 1, "site": "optimizer", "layer": -2, "kind": "scale", "struck_at": BEGAN + 45}
    lost = {"step": 7, "rank": 1, "site": "node", "kind": "loss", "struck_at": BEGAN + 47}
    found = alarm(6, rank=1, site="optimizer", check="at_rest", mended=False, detected_at=BEGAN + 47.5)
    page = draw(report(faults_injected=[struck, lost], detections=[found], decisions=[decision(6, "rewind")]))
    assert "seen by at_rest after 2.5 s" in page.text
    assert "met without an alarm" in page.text
    assert "Yes, by the record" in page.text
    assert page.with_class("remark") == []


def test_losses_sampled_before_and_after_a_restart_speak(draw: Draw) -> None:
    samples = Samples(
        progress=[(BEGAN + 50, 1, 4), (BEGAN + 90, 2, 4)],
        durations=[(1, step, 0.1) for step in range(1, 5)] + [(2, step, 0.1) for step in range(3, 5)],
        losses=[(1, 2, 3.0), (1, 3, 2.5), (2, 3, 2.5), (2, 4, 2.0)],
    )
    page = draw(report(), samples=samples)
    assert "1 loss was sampled before and after a restart: equal to the last bit." in page.text
    samples.losses[2] = (2, 3, 2.5000001)
    assert "step 3 was sampled before and after a restart, and was not the same" in draw(report(), samples=samples).text


def test_what_was_taken_again_is_drawn_apart(draw: Draw) -> None:
    samples = Samples(
        durations=[(1, step, 0.1) for step in range(1, 9)],
        losses=[*((1, step, 9.0 - step) for step in range(1, 7)), *((2, step, 9.0 - step) for step in range(4, 9))],
    )
    page = draw(report(), samples=samples)
    (again,) = (a["d"] for a in page.with_class("line-again"))
    (kept,) = (a["d"] for a in page.with_class("line-loss"))
    assert (again.count("M"), again.count("L")) == (1, 2), "steps 4, 5 and 6 of the first course"
    assert (kept.count("M"), kept.count("L")) == (2, 6), "steps 1 to 3, and 4 to 8"


def test_what_the_memory_tier_did(draw: Draw) -> None:
    kept = {
        "num_taken": 50,
        "interval_steps": None,
        "blocked_s": 1.5,
        "newest_step": {"memory": 98, "peer": 96},
        "newest_clean_step": 90,
        "num_steps_lost": 0,
    }
    generations = [{"generation": 1, "world_size": 2}, {"generation": 2, "world_size": 2}]
    page = draw(report(snapshots=kept, generations=generations))
    assert "0 steps were taken again." in page.text
    assert "50 memory snapshots, for which training waited 1.5 s in all." in page.text
    assert "memory 98, peer 96; step 90 is the newest known clean." in page.text


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_the_stroke(draw: Draw, bad: float) -> None:
    losses = [(1, step, 1.0 if step != 3 else bad) for step in range(1, 6)]
    page = draw(report(), samples=Samples(durations=[(1, 1, 0.1), (1, 5, 0.2)], losses=losses))
    (kept,) = (a["d"] for a in page.with_class("line-loss"))
    assert kept.count("M") == 2
    assert "nan" not in kept
    assert "inf" not in kept


def test_a_long_run_is_thinned_and_its_longest_step_stays(draw: Draw) -> None:
    durations = [(1, step, 30.0 if step == 77_777 else 0.1) for step in range(1, 100_001)]
    samples = Samples(
        progress=[(BEGAN + 40 + step / 200, 1, step) for step in range(1, 100_001, 7)],
        durations=durations,
        losses=[(1, step, 1 / step) for step in range(1, 100_001, 7)],
    )
    page = draw(report(num_steps=100_000), samples=samples)
    assert len(page.source) < 100_000
    assert "100,000 steps: median 100 ms, longest 30.0 s" in page.source


HOSTILE = "</style></title><script>alert(1)</script>\"' onload=x <img src=//e.example/> \x00\x1b[31m\ud800\u202eevil"


def test_nothing_of_a_run_becomes_markup(draw: Draw) -> None:
    texts = {"reason": HOSTILE, "decision_id": HOSTILE, "action": HOSTILE, "outcome": HOSTILE}
    page = draw(
        report(
            run_id=HOSTILE,
            outcome=HOSTILE,
            exit_code=1,
            reason=HOSTILE,
            versions={HOSTILE: HOSTILE},
            badput_s={HOSTILE: 5.0},
            detections=[alarm(3, site=HOSTILE, kind=HOSTILE, verdict=HOSTILE, device=HOSTILE, node=HOSTILE)],
            decisions=[decision(3, **texts)],
            faults_injected=[{"step": 3, "site": HOSTILE, "kind": HOSTILE, "struck_at": BEGAN + 41}],
            checkpoints=[{"kind": HOSTILE, "tag": HOSTILE, "reason": HOSTILE, "at": BEGAN + 50}],
            notes=[{"kind": HOSTILE, "message": HOSTILE}],
            generations=[
                {"generation": 1, "began_at": BEGAN, "restore": {"tier": HOSTILE, "reason": HOSTILE, "step": 1}}
            ],
        ),
        devices={HOSTILE: Device(HOSTILE, HOSTILE, HOSTILE, {0}, True, HOSTILE)},
        remarks=(HOSTILE,),
    )
    assert page.tags["script"] == page.tags["img"] == 0
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert "<script>alert(1)</script>" in page.text, "as text"
    page.source.encode("utf-8")
    assert not set("\x00\x1b\u202e") & set(page.source)


@pytest.mark.parametrize("content", [{}, {"schema_version": 7, "run_id": "r9"}, {"detections": "many"}])
def test_a_report_of_another_version_is_drawn_as_far_as_it_goes(draw: Draw, content: dict[str, Any]) -> None:
    page = draw(content)
    assert "schema version" in page.text
    assert "No times were recorded." in page.text


def test_entries_that_cannot_be_read_are_counted(draw: Draw) -> None:
    page = draw(report(detections=[alarm(3), 5, {"step": "soon"}, {"site": None}], goodput_ratio="much"))
    assert "3 entries of the report could not be read." in page.text
    assert "2 alarms" in page.text


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
ROWS = st.lists(
    st.dictionaries(
        st.sampled_from(["step", "site", "action", "kind", "at", "restore", "detected_at", "decided_at", "world_size"]),
        ANYTHING,
    ),
    max_size=3,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.dictionaries(st.sampled_from(sorted(Report.model_fields)), ANYTHING | ROWS))
def test_no_report_is_too_broken_for_a_page(draw: Draw, content: dict[str, Any]) -> None:
    assert "<h1>" in draw(content).source
