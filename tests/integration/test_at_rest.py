"""State struck at rest on two real ranks: seen before it is used, named, rebuilt or left to a restart; edits are none.

Compared on every rank, bit for bit, with plain DeepSpeed: weights, masters, moments, generators, counters.
"""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

WORKERS = Path(__file__).parent / "workers"
WEIGHT = "attention.0.q_proj.weight"
SHARDED = [f"zero{zero}-{precision}" for zero in (1, 2, 3) for precision in ("fp32", "bf16")]
ALL = ["zero0-fp32", "zero0-bf16", *SHARDED, "zero3-bf16-sharded", "zero2-bf16-offload"]
THOROUGH = ["zero0-fp32", "zero0-bf16", "zero1-bf16", "zero2-bf16", "zero3-bf16"]
LEFT_FOR_RESTART = 76

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    run_worker = runpy.run_path(str(WORKERS / "launch.py"))["run_worker"]
    lines = run_worker("at_rest_worker", tmp_path_factory.mktemp("at_rest"), timeout_s=280)
    return {line["case"]: line for line in lines}


def parameter_of(name: str) -> str:
    return WEIGHT if name.startswith(("zero0", "zero3")) else "head.weight"


@pytest.mark.parametrize("name", ALL)
def test_a_struck_weight_is_rebuilt_before_it_is_used(results: dict[str, dict[str, Any]], name: str) -> None:
    found = results[name]["weight"]
    expected = [[2, 0, "weight", "at_rest", WEIGHT, True], [4, 1, "weight", "at_rest", WEIGHT, True]]
    actions = ["2:mended", "4:mended"]
    if name in ("zero3-fp32", "zero3-bf16"):  # its shard and the copy that was gathered from it are two tensors
        expected.insert(1, [3, 1, "weight", "at_rest", f"shard of {WEIGHT}", True])
        actions.insert(1, "3:mended")
    assert sorted(found["detections"]) == expected
    assert found["actions"] == actions
    assert found["equal"], "the faults left a trace"


@pytest.mark.parametrize("name", ALL)
def test_what_the_script_edits_raises_no_alarm(results: dict[str, dict[str, Any]], name: str) -> None:
    found = results[name]["edits"]
    assert found["detections"] == []
    assert found["actions"] == []
    assert found["equal"], "an edit was undone"
    assert found["num_checks"]["weight"] > 0


@pytest.mark.parametrize("name", [name for name in ALL if not name.startswith("zero0")])
def test_a_struck_master_is_not_saved_and_leads_to_a_restart(results: dict[str, dict[str, Any]], name: str) -> None:
    found = results[name]["master"]
    parameter = parameter_of(name)
    assert found["detections"] == [[3, 1, "optimizer", "at_rest", f"master of {parameter}", False]]
    assert found["actions"] == ["3:state-damaged"]
    assert f"master of {parameter}" in found["reasons"][0]
    assert "on rank 1" in found["reasons"][0]
    assert "restart from the newest snapshot or checkpoint" in found["reasons"][0]
    assert (found["code"], found["step"]) == (LEFT_FOR_RESTART, 2)
    assert not found["saved"], "damaged state was written into a checkpoint"


@pytest.mark.parametrize("name", [name for name in THOROUGH if not name.startswith("zero0")])
def test_a_struck_moment_is_seen_before_the_optimizer_uses_it(results: dict[str, dict[str, Any]], name: str) -> None:
    found = results[name]["moment"]
    assert found["detections"] == [[3, 1, "optimizer", "at_rest", f"exp_avg of {parameter_of(name)}", False]]
    assert (found["code"], found["step"]) == (LEFT_FOR_RESTART, 2)


@pytest.mark.parametrize(
    ("name", "what", "tensor"),
    [("zero0-fp32", "moment", "exp_avg"), ("zero0-bf16", "moment", "exp_avg"), ("zero0-bf16", "master", "master")],
)
def test_without_zero_optimizer_state_is_taken_from_another_rank(
    results: dict[str, dict[str, Any]], name: str, what: str, tensor: str
) -> None:
    found = results[name][what]
    assert found["detections"] == [[3, 1, "optimizer", "at_rest", f"{tensor} of {WEIGHT}", True]]
    assert found["actions"] == ["3:mended"]
    assert found["equal"]


@pytest.mark.parametrize("name", THOROUGH)
def test_clean_runs_stay_as_they_are(results: dict[str, dict[str, Any]], name: str) -> None:
    found = results[name]["clean"]
    assert found["detections"] == []
    assert found["actions"] == []
    assert found["equal"]
    assert min(found["num_checks"].values()) > 200, "nothing was compared"


@pytest.mark.parametrize("name", THOROUGH)
def test_a_weight_that_changes_in_use_is_rebuilt_and_the_step_run_again(
    results: dict[str, dict[str, Any]], name: str
) -> None:
    found = results[name]["in_use"]
    assert found["detections"] == [
        [3, 0, "weight", "at_rest", WEIGHT, True],
        [3, 0, "gradient", "at_rest", None, False],
    ]
    assert found["actions"] == ["3:replay", "3:replayed-clean"]
    assert found["equal"]


@pytest.mark.parametrize("name", THOROUGH)
def test_replicas_that_differ_are_found_and_the_masters_blame(results: dict[str, dict[str, Any]], name: str) -> None:
    found = results[name]["replica"]
    if name == "zero0-fp32":  # two ranks, no masters: nobody can say who is right
        assert found["detections"] == [[3, rank, "weight", "replica", WEIGHT, False] for rank in (0, 1)]
        assert found["code"] == LEFT_FOR_RESTART
        return
    assert found["detections"] == [[3, 1, "weight", "replica", WEIGHT, True]]
    assert found["actions"] == ["3:mended"]
    assert found["equal"]
