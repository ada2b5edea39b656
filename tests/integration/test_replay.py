"""What can happen to a step, on two real ranks with a coordinator that answers by the policy without a network."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

WORKERS = Path(__file__).parent / "workers"

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(400)]

Results = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    run_worker = runpy.run_path(str(WORKERS / "launch.py"))["run_worker"]
    found: Results = {}
    for line in run_worker("scenario_worker", tmp_path_factory.mktemp("scenarios"), timeout_s=360):
        found.setdefault(line["scenario"], []).append(line)
    return found


def test_the_fault_matters_where_nothing_protects(results: Results) -> None:
    assert results["unprotected_fault"][0]["equal"] is False


def test_without_a_coordinator_the_ranks_decide_by_the_same_policy(results: Results) -> None:
    first, second = results["fail_open"]
    assert first["equal"]
    assert first["rules"] == ["replay", "replayed-clean"]
    assert all(reason.startswith("no coordinator answered") for reason in first["reasons"])
    assert second["roots"] == ["5:gradient:norm_spike:a0"], "blame stays with the rank that computed it"
    assert first["roots"] == []


def test_a_forward_fault_is_replayed_and_the_loss_that_the_script_holds_is_corrected(results: Results) -> None:
    result = results["forward_fault_replayed"][0]
    assert result["equal"]
    assert result["losses_equal"]
    assert result["actions"] == ["4:replay:succeeded", "4:continue:succeeded"]


def test_cotangents_that_do_not_fit_lead_to_a_restart_and_blame_no_device(results: Results) -> None:
    for result in results["forward_fault_outside"]:
        assert result["exit_code"] == 76
        assert result["steps"] == 3, "the step is not taken"
        assert result["cordon"] == []
    assert results["forward_fault_outside"][0]["rules"] == ["replay", "restart"]


def test_a_persistent_fault_does_not_loop(results: Results) -> None:
    first, second = results["persistent"]
    assert first["rules"] == ["replay", "replay", "persistent"]
    assert first["verdicts"] == ["persistent", "propagated"]
    assert len(first["cordon"]) == 1
    assert first["exit_code"] == second["exit_code"] == 75
    assert first["left"][0] == second["left"][0] == 75


def test_a_nan_of_the_data_is_left_to_deepspeed(results: Results) -> None:
    result = results["nan_once"][0]
    assert result["equal"], "the same as stock DeepSpeed, which skips"
    assert result["skipped"] == result["stock_skipped"] == 1
    assert result["rules"] == ["replay", "data-non-finite"]
    assert result["verdicts"] == ["deterministic", "propagated"]
    assert result["cordon"] == []


def test_nans_of_the_data_end_in_93_after_so_many_in_a_row(results: Results) -> None:
    for result in results["nan_for_good"]:
        assert result["exit_code"] == 93
        assert result["skipped"] == 2
    assert results["nan_for_good"][0]["rules"][-1] == "data-skips-exhausted"


@pytest.mark.parametrize(
    "case", [*(f"zero{zero}-{precision}" for zero in range(4) for precision in ("fp32", "bf16")), "zero3-padded"]
)
def test_a_wrong_sum_over_the_ranks_is_seen_where_it_lies_and_replayed(results: Results, case: str) -> None:
    first, second = (result[case] for result in results["wrong_reduction"])
    assert first["matters"], "the fault does no harm where nobody looks"
    assert first["equal"]
    assert second["equal"]
    assert first["actions"] == ["4:replay:succeeded", "4:continue:succeeded"]
    assert (first["roots"], second["roots"]) == ([], ["4:gradient.sum:mismatch:a0"])
    assert first["cordon"] == []


def test_a_sum_that_stays_wrong_blames_no_device_and_ends_the_generation(results: Results) -> None:
    first, second = results["wrong_reduction_for_good"]
    assert first["rules"] == ["replay", "replay", "restart"]
    assert first["cordon"] == []
    assert first["exit_code"] == second["exit_code"] == 76


@pytest.mark.parametrize("stage", ["zero0", "zero2"])
def test_the_search_for_a_loss_scale_is_not_disturbed(results: Results, stage: str) -> None:
    searches = results.get("scale_search")
    if searches is None:
        pytest.skip("this CPU does not compute in fp16")
    result = searches[0][stage]
    assert result["scales_equal"]
    assert result["equal"]
    assert result["num_scales"] > 2, "the scale did change"
    assert result["actions"] == []
    assert all(search[stage]["roots"] == [] for search in searches)


def test_an_overflow_at_a_scale_that_worked_is_tried_again(results: Results) -> None:
    overflows = results.get("overflow_at_a_proven_scale")
    if overflows is None:
        pytest.skip("this CPU does not compute in fp16")
    result = overflows[0]
    assert result["equal"], "DeepSpeed alone would have skipped the step and lowered the scale"
    assert result["scales_equal"]
    assert result["rules"] == ["replay", "replayed-clean"]


def test_shadow_mode_records_and_does_nothing(results: Results) -> None:
    result = results["shadow"][0]
    assert result["equal"], "the same as without protection, fault and all"
    assert result["actions"] == ["5:continue:shadowed"]
    assert "would have been replay" in result["reasons"][0]


@pytest.mark.parametrize(("order", "exit_code"), [("stop", 75), ("restart", 76), ("fenced", 75)])
def test_an_order_that_one_rank_hears_is_obeyed_by_all_at_the_same_step(
    results: Results, order: str, exit_code: int
) -> None:
    for result in results[order]:
        assert result["exit_code"] == exit_code
        assert result["steps"] == 2


def test_a_drain_waits_for_the_next_checkpoint(results: Results) -> None:
    for result in results["drain"]:
        assert result["exit_code"] == 75
        assert result["steps"] == 4


def test_a_loss_around_the_outputs_is_noticed_and_training_stays_as_it_was(results: Results) -> None:
    stages = {key: value for key, value in results["around_the_outputs"][0].items() if isinstance(value, dict)}
    assert len(stages) == 6
    for stage, result in stages.items():
        assert result["equal"], stage
        assert any("replay off" in note for note in result["notes"]), stage


def test_evaluation_in_between_does_not_disturb(results: Results) -> None:
    result = results["evaluation_between"][0]
    assert result["equal"]
    assert result["actions"] == ["5:replay:succeeded", "5:continue:succeeded"]


def test_a_pipeline_is_announced_and_its_faulty_step_not_taken(results: Results) -> None:
    first, second = results["pipeline"]
    assert first["equal"], "protection without a fault changed nothing"
    assert first["notes"] == [
        "replay_off: replay off: pipeline and hybrid engines; restart from the last verified checkpoint serves instead;"
        " weights and optimizer state are not checked at rest"
    ]
    assert first["rules"] == ["restart"]
    assert first["exit_code"] == second["exit_code"] == 76
    assert first["steps"] == second["steps"] == 4


def test_the_engine_is_put_back(results: Results) -> None:
    assert results["put_back"][0]["left_over"] == []
