"""The support matrix, run: plain DeepSpeed, protected, and protected with faults end in the same bits.

Compared on every rank: weights, master weights, moments, buffers, generators, counters, loss scale, and the losses that
the script saw.
"""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

WORKERS = Path(__file__).parent / "workers"
CASES = runpy.run_path(str(WORKERS / "matrix_cases.py"))["CASES"]

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    run_worker = runpy.run_path(str(WORKERS / "launch.py"))["run_worker"]
    lines = run_worker("matrix_worker", tmp_path_factory.mktemp("matrix"), timeout_s=540)
    return {line["case"]: line for line in lines}


@pytest.mark.parametrize("name", [case.name for case in CASES])
def test_bit_identity(results: dict[str, dict[str, Any]], name: str) -> None:
    result = results.get(name)
    if result is None:
        assert "fp16" in name, "the worker leaves out fp16 alone, where the device cannot compute in it"
        pytest.skip("this CPU does not compute in fp16")
    assert result["finite"]
    assert result["clean_equal"], "protection without a fault changed the result"
    assert result["clean_losses_equal"]
    assert result["clean"]["actions"] == [], "a decision without a fault"
    assert result["clean"]["deterministic"] is True
    assert result["faulty_equal"], "the faults left a trace"
    assert result["faulty_losses_equal"]
    # One fault mended in place in step 2, one replayed in step 5.
    assert result["faulty"]["actions"] == ["2:corrected:succeeded", "5:replay:succeeded", "5:continue:succeeded"]
