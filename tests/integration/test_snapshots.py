"""Memory snapshots of two real ranks: loaded into live and into fresh engines, they go on as if nothing had been.

Compared on every rank, bit for bit: weights, masters, moments, generators, counters, losses of the steps that follow.
"""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

WORKERS = Path(__file__).parent / "workers"
PLAIN = [f"zero{zero}-{precision}" for zero in (0, 1, 2, 3) for precision in ("fp32", "bf16")]
ALL = [*PLAIN, "zero3-bf16-sharded", "zero2-bf16-offload", "zero1-bf16-gpt2"]

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    run_worker = runpy.run_path(str(WORKERS / "launch.py"))["run_worker"]
    lines = run_worker("snapshot_worker", tmp_path_factory.mktemp("snapshots"), timeout_s=280)
    return {line["case"]: line for line in lines}


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("engine", ["live", "fresh"])
def test_a_snapshot_brings_everything_back(results: dict[str, dict[str, Any]], name: str, engine: str) -> None:
    assert results[name][f"{engine}_state"], "the state is not that at the snapshot"
    assert results[name][f"{engine}_course"], "the steps after it went another way"
    assert results[name]["off"] == []


@pytest.mark.parametrize("name", ALL)
def test_a_flipped_byte_in_any_file_is_refused_by_all_ranks(results: dict[str, dict[str, Any]], name: str) -> None:
    said = results[name]["flipped"]
    assert len(said) >= 3
    assert all(line.endswith(("when the snapshot was taken", "are not what they were")) for line in said), said


@pytest.mark.parametrize(
    "name", [*(f"zero{zero}-bf16" for zero in (0, 1, 2, 3)), "zero3-sharded", "statistics"], ids=str
)
def test_what_is_copied_just_before_the_next_step_is_the_state_of_the_last_one(
    results: dict[str, dict[str, Any]], name: str
) -> None:
    found = results[f"late-{name}"]
    assert found["off"] == []
    assert found["pending"] == [], "a snapshot is none before it is copied"
    assert found["lost"] == 0, "something that only a step may change has changed"
    assert found["whole"] == [1]
    assert found["different"] == []
    assert found["late_bytes"] > 0.9 * found["all_bytes"], "most of it was not left for later"


def test_nothing_grows_over_a_thousand_snapshots(results: dict[str, dict[str, Any]]) -> None:
    (memory, files, descriptors), later = results["growth"]["sizes"]
    assert later[0] - memory < 16 << 20
    assert later[1:] == [files, descriptors]


def test_an_arena_that_cannot_fit_is_said_and_left_alone(results: dict[str, dict[str, Any]]) -> None:
    found = results["room"]
    assert len(found["off"]) == 1
    assert "MiB more" in found["off"][0]
    assert "snapshot.slots" in found["off"][0]
    assert not found["can_take"]
    assert found["steps"] == []
