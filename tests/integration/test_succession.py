"""Trail and fast-forward on two real ranks: what a restarted script is led past, and when it is refused, and why."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

WORKERS = Path(__file__).parent / "workers"

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(300)]

Results = dict[str, list[dict[str, Any]]]

LED = [
    "zero0-fp32-accumulation1",
    "zero1-bf16-accumulation2",
    "zero2-bf16-accumulation2",
    "zero3-bf16-accumulation2",
    "gpt2-eager-stored",
    "direct-zero2",
    "evaluation",
    "own_checkpoint",
]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    run_worker = runpy.run_path(str(WORKERS / "launch.py"))["run_worker"]
    found: Results = {}
    for line in run_worker("succession_worker", tmp_path_factory.mktemp("succession"), timeout_s=240):
        found.setdefault(line["scenario"], []).append(line)
    return found


@pytest.mark.parametrize("scenario", LED)
def test_a_script_that_begins_anew_ends_with_the_same_state_and_has_seen_the_same_losses(
    results: Results, scenario: str
) -> None:
    for result in results[scenario]:
        assert result["facts"][:1] in (["loaded:4"], [])
        assert result["equal"]
        assert result["losses_equal"]
    assert results[scenario][0]["facts"] == ["loaded:4"]
    start = 2 if scenario == "own_checkpoint" else 0
    assert f"from step {start} to step 4" in results[scenario][0]["notes"][0]


@pytest.mark.parametrize(
    ("scenario", "why"),
    [
        ("other_data", "the inputs of forward 1 of step 3 differ from those that were recorded"),
        ("convolution", "uses an output of the model that was too large to be recorded (shape (4, 16, 64)"),
        ("reading_weights", "the script reads the model's weights (state_dict)"),
        ("reading_parameters", "computes a loss from the model's parameters, past the engine"),
    ],
)
def test_a_script_that_cannot_be_led_leaves_for_a_restart_and_every_snapshot_is_refused(
    results: Results, scenario: str, why: str
) -> None:
    for result in results[scenario]:
        assert result["exit_code"] == 76
        assert result["steps"] < 4, "nothing was loaded"
        assert result["facts"] == ["refused:3", "refused:4"]
        assert why in result["reasons"][0]
        assert why in result["left"][1]


@pytest.mark.parametrize(
    ("scenario", "why"),
    [
        ("budget", "the trail has reached snapshot.trail_max_mib"),
        ("damaged_trail", "trail-1.bin: is not the trail that the manifest vouches for (rank 1)"),
    ],
)
def test_what_is_known_before_the_first_forward_needs_no_further_restart(
    results: Results, scenario: str, why: str
) -> None:
    for result in results[scenario]:
        assert result["exit_code"] is None
        assert result["steps"] == 6
        assert result["facts"] == ["refused:3", "refused:4"]
        assert why in result["reasons"][0]
