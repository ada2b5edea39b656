"""The fault-injection campaign in its shortest form: two models, eager and fused attention, float32 and bfloat16."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
EXTREME = {"nan", "inf", "-inf", "near_inf"}


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    directory = tmp_path_factory.mktemp("campaign")
    words = ["--trials", "2", "--clean-checks", "2000", "--outcomes", "2", "--seed", "7"]
    files = ["--json", str(directory / "campaign.json"), "--picture", str(directory / "campaign.png")]
    result = subprocess.run(
        [sys.executable, str(SCRIPTS / "run_bench.py"), "campaign", *words, *files],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    assert "Detection by kind" in result.stdout
    return json.loads((directory / "campaign.json").read_text(encoding="utf-8")), directory / "campaign.png"


def of(result: dict[str, Any], **wanted: Any) -> tuple[int, int, int]:
    """(trials, detected, corrected in place) of all cells whose site and dtype are wanted, of extreme kinds."""
    cells = [
        cell
        for cell in result["cells"]
        if cell["kind"] in EXTREME and all(cell[name] == value for name, value in wanted.items())
    ]
    trials, detected, corrected = (sum(cell[name] for cell in cells) for name in ("trials", "detected", "corrected"))
    return trials, detected, corrected


@pytest.mark.integration
@pytest.mark.slow
def test_extreme_errors_are_found_and_corrected_everywhere(campaign: tuple[dict[str, Any], Path]) -> None:
    result, _ = campaign
    sites = {cell["site"] for cell in result["cells"]}
    assert len(sites) == 19
    for dtype in ("float32", "bfloat16"):
        for site in sites:
            trials, detected, corrected = of(result, dtype=dtype, site=site)
            assert trials >= 4
            assert detected == corrected == trials, (dtype, site)


@pytest.mark.integration
@pytest.mark.slow
def test_products_in_float32_miss_nothing_that_matters(campaign: tuple[dict[str, Any], Path]) -> None:
    result, _ = campaign
    rows = [row for row in result["curve"] if (row["dtype"], row["check"]) == ("float32", "product")]
    large = [row for row in rows if row["from"] >= 0.99e-2]
    assert sum(row["trials"] for row in large) > 500
    assert all(row["detected"] == row["trials"] for row in large)
    assert any(row["detected"] < row["trials"] for row in rows), "round-off is not called a fault"


@pytest.mark.integration
@pytest.mark.slow
def test_the_campaign_changes_nothing_but_what_it_strikes(campaign: tuple[dict[str, Any], Path]) -> None:
    result, picture = campaign
    assert result["control"]["steps"] == result["control"]["equal"] > 0
    assert result["false_positives"]["alarms"] == 0
    assert result["false_positives"]["checks"] >= 2000
    assert {row["group"] for row in result["outcomes"]} >= {"seen", "not seen"}
    assert picture.read_bytes().startswith(b"\x89PNG")
