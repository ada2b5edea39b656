"""Faults inside the steps of the Hugging Face Trainer and of a loop on Accelerate, which know nothing of this package.

What happens to them when a rank is killed is in test_fast_forward.py.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.integration.harness import DEEPSPEED_CONFIG, SCRIPTS, Run, digest, launched

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(400)]

FAULTS = """
[[fault]]
step = 3
rank = 1
micro_step = 1
site = "linear.out"
layer = 1
kind = "inf"

[[fault]]
step = 6
rank = 0
site = "gradient"
kind = "scale"
factor = 1e6
"""


def run(directory: Path, script: str, *, faulted: bool) -> Run:
    monitor = {"enabled": True, "output_path": str(directory / "monitor"), "job_name": "job"}
    config: dict[str, Any] = {**DEEPSPEED_CONFIG, "csv_monitor": monitor}
    if script == "accelerate":
        del config["optimizer"]  # the script brings its own
    words = ["--steps", "8", *(["--evaluate-every", "4"] if script == "trainer" else [])]
    options: dict[str, Any] = {"faults": FAULTS} if faulted else {"plain": True}
    with launched(
        directory, script=SCRIPTS / f"train_{script}.py", script_args=words, deepspeed_config=config, **options
    ) as launch:
        code = launch.wait()
    # gloo's threads may abort an interpreter of plain DeepSpeed that shuts down; its checkpoint is there by then.
    assert code == 0 or not faulted, launch.output()[-6000:]
    return launch


def said(launch: Run) -> list[str]:
    return re.findall(r"^(?:history|step \d|done at).*$", launch.output(), flags=re.MULTILINE)


@pytest.mark.parametrize("script", ["trainer", pytest.param("accelerate", marks=pytest.mark.long)])
def test_faults_leave_no_trace_in_the_weights_and_one_in_the_monitor(tmp_path: Path, script: str) -> None:
    struck, stock = run(tmp_path / "struck", script, faulted=True), run(tmp_path / "stock", script, faulted=False)
    report = struck.report()
    assert [(each["step"], each["action"]) for each in report["decisions"]] == [
        (3, "corrected"),
        (6, "replay"),
        (6, "continue"),
    ]
    assert report["deterministic"] is True
    assert digest(struck.directory, "final") == digest(stock.directory, "final")
    assert said(struck) == said(stock), "losses, averages and evaluations"
    (point,) = (struck.directory / "monitor/job/Resilience_decisions_replay.csv").read_text().splitlines()[1:]
    rates = (struck.directory / "monitor/job/Train_Samples_lr.csv").read_text().splitlines()[1:]
    assert point.split(",")[0] == rates[5].split(",")[0], "the replay of step 6 stands where its learning rate does"
    assert not list((stock.directory / "monitor/job").glob("Resilience*"))
