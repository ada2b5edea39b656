"""Committed damage on two real ranks: the snapshot from before it is loaded into the live engine, nothing is lost.

Compared on every rank, bit for bit, with plain DeepSpeed: weights, masters, moments, generators, counters, losses.
"""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest

from tests.integration.harness import SCRIPTS, digest, launched

WORKERS = Path(__file__).parent / "workers"
ALL = [
    *(f"zero{zero}-{precision}" for zero in (0, 1, 2, 3) for precision in ("fp32", "bf16")),
    "zero3-bf16-sharded",
    "zero2-gpt2",
    "zero3-llama",
    "zero1-direct",
    "zero2-bf16-late",
    "zero3-bf16-late",
]
THOROUGH = "zero2-bf16"
LEFT_FOR_RESTART = 76

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(400)]

Results = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    run_worker = runpy.run_path(str(WORKERS / "launch.py"))["run_worker"]
    lines = run_worker("rewind_worker", tmp_path_factory.mktemp("rewind"), timeout_s=380)
    return {line["case"]: line for line in lines}


@pytest.mark.parametrize("name", ALL)
def test_state_that_is_multiplied_on_one_rank_is_gone_back_from(results: Results, name: str) -> None:
    found = results[name]["damage"]
    # Copies that differ are compared after every second step only, state at rest before each use.
    step = 7 if name.startswith("zero0") else 6
    assert found["actions"] == [f"{step}:rewind:succeeded", f"{step}:rewound-clean:succeeded"]
    assert found["equal"], "the damage left a trace"
    assert found["losses_equal"]
    assert "rewind" in found["badput"]
    assert found["lost_s"][0] > 0
    assert (found["waits_for_copies"] > 0) == name.endswith("late"), "snapshots were not copied beside the next forward"


def test_an_operators_rewind_with_nothing_wrong_changes_nothing(results: Results) -> None:
    found = results[THOROUGH]["order"]
    assert found["actions"] == ["6:ordered-rewind:succeeded", "6:rewound-clean:succeeded"]
    assert "the memory snapshot of step 3 is loaded" in found["reasons"][0], "the newest that is known to be clean"
    assert found["equal"]
    assert found["losses_equal"]


@pytest.mark.parametrize("what", ["to_a_step", "fault_on_the_way", "all_weights", "nan", "spike"])
def test_whatever_the_damage_the_end_is_that_of_a_run_without_it(results: Results, what: str) -> None:
    assert results[THOROUGH][what]["equal"]


def test_an_operator_may_name_the_step(results: Results) -> None:
    assert "the memory snapshot of step 5 is loaded" in results[THOROUGH]["to_a_step"]["reasons"][0]


def test_a_fault_on_the_way_is_replayed_like_any_other(results: Results) -> None:
    found = results[THOROUGH]["fault_on_the_way"]
    assert [action for action in found["actions"] if action.startswith("5:")] == [
        "5:replay:succeeded",
        "5:replayed-clean:succeeded",
    ]


def test_one_slice_that_changed_has_all_weights_looked_at(results: Results) -> None:
    found = results[THOROUGH]["all_weights"]
    assert found["actions"] == ["5:mended:succeeded"], "they are rebuilt before they are used"
    assert len(found["detections"]) > 20


def test_weights_that_are_not_finite_lead_back_and_not_to_a_skip(results: Results) -> None:
    found = results[THOROUGH]["nan"]
    assert found["actions"] == ["6:rewind:succeeded", "6:rewound-clean:succeeded"]
    assert [*found["detections"][0][:2], *found["detections"][0][2:4]] == [6, 0, "weight", "screen"]


def test_a_loss_spike_is_replayed_first(results: Results) -> None:
    rules = [action.split(":")[1] for action in results[THOROUGH]["spike"]["actions"]]
    assert rules == ["replay", "loss-rewind", "rewound-clean"]


@pytest.mark.parametrize(
    ("what", "why"),
    [
        ("short", "within 9.53674e-07 MiB (snapshot.history_max_mib)"),
        ("no_budget", "the budget of 0 rewinds within 3600 s is used up"),
    ],
)
def test_where_no_rewind_is_possible_it_is_a_restart_that_says_why(results: Results, what: str, why: str) -> None:
    found = results[THOROUGH][what]
    assert found["actions"] == ["6:state-damaged:succeeded"]
    assert why in found["reasons"][0]
    assert found["code"] == LEFT_FOR_RESTART


def test_what_the_script_wrote_between_two_steps_is_not_done_over(results: Results) -> None:
    found = results[THOROUGH]["edited"]
    assert found["actions"] == ["7:order-refused:succeeded"]
    assert "the script wrote weights or optimizer state after step 4" in found["reasons"][0]
    assert found["equal"]


def test_the_same_damage_a_step_later_is_gone_back_from_again(results: Results) -> None:
    found = results[THOROUGH]["again"]
    assert [action.split(":")[1] for action in found["actions"]] == ["rewind", "rewound-clean"] * 2
    assert found["equal"]


DAMAGE = """
[[fault]]
step = 5
rank = 1
site = "optimizer"
param = "master of head.weight"
kind = "scale"
factor = 1.5
index = 0
count = 8
"""
EVERY_STEP = "[detection]\nat_rest_share = 1.0\n[snapshot]\ninterval_steps = 1\n"


def test_a_launched_run_goes_back_and_ends_with_the_weights_of_a_clean_one(tmp_path: Path) -> None:
    digests = []
    for name, faults in (("faulty", DAMAGE), ("clean", None)):
        with launched(tmp_path / name, resilience=EVERY_STEP, faults=faults, script_args=["--steps", "8"]) as run:
            assert run.wait() == 0, run.output()[-4000:]
            digests.append(digest(tmp_path / name))
            report = run.report()
            run.assert_nothing_left()
        if faults is not None:
            actions = [(each["step"], each["action"], each["outcome"]) for each in report["decisions"]]
            assert actions == [(6, "rewind", "succeeded"), (6, "continue", "succeeded")]
            assert report["badput_s"]["rewind"] > 0
        assert report["num_generations"] == 1, "no process was started again"
        assert report["num_steps"] == 8
    assert digests[0] == digests[1]


UNSEEN = """
[detection]
at_rest_share = 0.0
replica_interval_steps = 0
[policy]
loss_spike_factor = 4.0
[snapshot]
interval_steps = 1
verify_steps = 4
"""
TWENTY_STEPS = ["--steps", "20", "--save-every", "8"]


def test_a_rank_that_is_killed_in_a_rewind_leaves_no_damaged_snapshot_to_the_restart(tmp_path: Path) -> None:
    """Snapshots of the damaged state are whole on both ranks: only that a rewind was under way tells against them. And
    the script had saved a checkpoint of it."""
    script = SCRIPTS / "train_killed.py"
    with launched(tmp_path / "faulty", resilience=UNSEEN, script_args=TWENTY_STEPS, script=script) as run:
        assert run.wait() == 0, run.output()[-4000:]
        report = run.report()
        run.assert_nothing_left()
    with launched(tmp_path / "clean", plain=True, script_args=TWENTY_STEPS) as run:
        assert run.wait() == 0, run.output()[-4000:]
    decisions = {each["decision_id"]: each for each in report["decisions"]}
    (rewind,) = (each for each in decisions.values() if each["action"] == "rewind")
    assert rewind["outcome"] != "succeeded"
    restart = decisions["g1-exit"]
    assert (restart["action"], restart["outcome"]) == ("restart", "succeeded")
    target = int(re.findall(r"snapshot of step (\d+) is loaded", rewind["reason"])[0])
    assert 0 < target < 15
    assert f"begins from the memory snapshot of step {target}" in restart["reason"]
    assert target < 16, "the checkpoint of step 16 was saved before the damage was found"
    refused = [(c["tag"], c["reason"]) for c in report["checkpoints"] if c["kind"] == "refused"]
    assert [tag for tag, _ in refused] == ["global_step16"]
    assert f"step {target} is the newest that is known to be clean" in refused[0][1]
    assert report["num_generations"] == 2
    assert digest(tmp_path / "faulty") == digest(tmp_path / "clean")
