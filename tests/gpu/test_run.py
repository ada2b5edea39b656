"""A run under `deepspeed --resilience` on one GPU with NCCL: a fault is found at the boundary and replayed away."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.gpu.configs import ONE_GPU, config
from tests.integration.harness import digest, launched

pytestmark = [pytest.mark.gpu, pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(600)]

FAULT = """
[[fault]]
step = 5
rank = 0
site = "attention.scores"
layer = 1
kind = "inf"
"""


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_fault_in_forward_ends_in_the_fault_free_weights(tmp_path: Path, stage: int) -> None:
    runs = {"plain": {"plain": True}, "faulted": {"faults": FAULT}}
    for name, options in runs.items():
        with launched(tmp_path / name, launch_args=ONE_GPU, deepspeed_config=config(stage), **options) as run:
            assert run.wait(300.0) == 0, run.output()[-4000:]
            if name == "faulted":
                report = run.report()
    assert report["deterministic"] is True, "this model's kernels on this GPU give other bits in a second run"
    assert [fault["step"] for fault in report["faults_injected"]] == [5]
    assert next(decision["action"] for decision in report["decisions"]) == "replay"
    first = report["detections"][0]
    assert (first["step"], first["site"], first["layer"]) == (5, "attention.scores", 1)
    assert first["verdict"] == "transient"
    assert digest(tmp_path / "faulted") == digest(tmp_path / "plain")
