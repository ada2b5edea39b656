"""`scripts/gpu-check` where there is no GPU, and what it makes of results."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def gpu_check() -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "scripts")
        return runpy.run_path(str(ROOT / "scripts" / "run_gpu_check.py"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
@pytest.mark.parametrize("words", [["scripts/gpu-check"], [sys.executable, "scripts/run_gpu_check.py"]], ids=str)
def test_without_a_device_it_ends_with_one_line_and_69(words: list[str]) -> None:
    answer = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert answer.returncode == 69
    assert answer.stdout == ""
    (line,) = answer.stderr.splitlines()
    assert "CUDA" in line
    assert "nothing was run" in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
@pytest.mark.parametrize("name", ["attention", "checksum", "hash"])
def test_a_kernels_benchmark_says_what_it_lacks(name: str) -> None:
    command = [sys.executable, "-m", f"resilience.kernels.{name}.bench"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (answer.returncode, answer.stdout, answer.stderr) == (69, "", "needs a CUDA device\n")


def test_every_kernel_has_a_benchmark(gpu_check: dict[str, Any]) -> None:
    assert set(gpu_check["BENCHMARKS"]) == {path.parent.name for path in (ROOT / "kernels").glob("*/__init__.py")}


def test_every_part_becomes_a_table(gpu_check: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    part = gpu_check["Part"]
    overhead = {"name": "gpt2", "rows": [{"strength": "checksum", "median_ratio": 1.02, "ratios": [1.0, 1.04]}]}
    results = [
        part("tests", "pytest", 0, 12.0, [{"tests": 40, "failures": 0}]),
        part("overhead", "scripts/bench", 0, 60.0, [overhead]),
        part("hash", "python", 1, 1.0, []),
    ]
    gpu_check["show"]({"gpu": "a GPU", "driver": "1", "torch": "2"}, results)
    shown = capsys.readouterr().out
    for text in ("40", "gpt2", "checksum", "1.02", "failed (1)", "a GPU"):
        assert text in shown


def test_results_of_a_command_are_read_from_its_file(gpu_check: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    program = f"import pathlib; pathlib.Path({str(file)!r}).write_text({json.dumps([{'a': 1}])!r})"
    part = gpu_check["_with_rows"](gpu_check["_run"]("name", [sys.executable, "-c", program]), file)
    assert (part.exit_code, part.rows) == (0, [{"a": 1}])
    failed = gpu_check["_with_rows"](
        gpu_check["_run"]("name", [sys.executable, "-c", "raise SystemExit(3)"]), tmp_path / "none"
    )
    assert (failed.exit_code, failed.rows) == (3, [])


def test_what_snapshots_cost_becomes_rows(gpu_check: dict[str, Any]) -> None:
    timed = {"name": "memory snapshot", "blocked_s": [0.3, 0.1, 0.2], "durable_s": [1.0, 1.0, 1.0]}
    steps = [{"with_s": seconds, "without_s": 2.0} for seconds in (2.0, 2.2, 2.6)]
    rows = gpu_check["_rows_of_snapshots"]({"save": [timed], "restore": [timed], "steps": steps})
    assert [(row["what"], row.get("blocked_s")) for row in rows[:2]] == [("save", 0.2), ("restore", 0.2)]
    assert rows[2]["ratio"] == 1.1
