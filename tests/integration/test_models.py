"""Hugging Face models under every ZeRO stage, damaged and with each rank killed, end with stock DeepSpeed's weights.

Sixteen pairs of launches take minutes: they run when they are asked for (`scripts/test -m long`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.integration.harness import DEEPSPEED_CONFIG, SCRIPTS, digest, launched

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.long]

PARAMETERS = {"gpt2": "transformer.h.1.mlp.c_fc.weight", "llama": "model.layers.1.mlp.up_proj.weight"}

FAULTS = """
[[fault]]
step = 4
rank = 1
site = "optimizer"
param = "exp_avg of {parameter}"
kind = "scale"
factor = 1.5
index = 0
count = 64

[[fault]]
step = 7
rank = 0
micro_step = 1
site = "process"
kind = "kill"

[[fault]]
step = 10
rank = 1
site = "process"
kind = "kill"
"""
SETTINGS = "[detection]\nat_rest_share = 1.0\n[snapshot]\ninterval_steps = 1\n"


def configuration(stage: int, dtype: str) -> dict[str, Any]:
    config = {key: value for key, value in DEEPSPEED_CONFIG.items() if key != "bf16"}
    return config | {"zero_optimization": {"stage": stage}} | ({"bf16": {"enabled": True}} if dtype == "bf16" else {})


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_damage_and_two_kills_leave_no_trace(tmp_path: Path, model: str, stage: int, dtype: str) -> None:
    options = {
        "script": SCRIPTS / "train_hf.py",
        "script_args": ["--model", model],
        "deepspeed_config": configuration(stage, dtype),
    }
    with launched(tmp_path / "plain", plain=True, **options) as run:
        assert run.wait() == 0, run.output()[-4000:]
    faults = FAULTS.format(parameter=PARAMETERS[model])
    with launched(tmp_path / "struck", faults=faults, resilience=SETTINGS, **options) as run:
        assert run.wait() == 0, run.output()[-6000:]
        report = run.report()
        run.assert_nothing_left()
    assert digest(tmp_path / "struck") == digest(tmp_path / "plain")
    actions = [decision["action"] for decision in report["decisions"] if decision["action"] != "continue"]
    # Without ZeRO the other rank has the same state, and the damage is mended from there.
    assert actions == ["corrected" if stage == 0 else "rewind", "restart", "restart"]
    assert [each["restore"]["step"] for each in report["generations"][1:]] == [6, 9], "no step was lost"
