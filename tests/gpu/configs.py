"""DeepSpeed's configuration of runs on one GPU."""

from __future__ import annotations

from typing import Any

from tests.integration.harness import DEEPSPEED_CONFIG

__all__ = ["ONE_GPU", "config"]

ONE_GPU = ["--num_gpus", "1"]
"""Words for the launcher."""


def config(stage: int) -> dict[str, Any]:
    """Of this ZeRO stage. With torch's own Adam: DeepSpeed's needs an nvcc of the version that torch was built with."""
    optimizer = DEEPSPEED_CONFIG["optimizer"]
    parameters = {**optimizer["params"], "torch_adam": True}
    return {
        **DEEPSPEED_CONFIG,
        "optimizer": {**optimizer, "params": parameters},
        "zero_optimization": {"stage": stage},
    }
