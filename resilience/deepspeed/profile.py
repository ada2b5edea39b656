"""Reads off an engine what the support matrix asks about it."""

from __future__ import annotations

from typing import Any

from deepspeed.runtime.utils import DummyOptim

from resilience.guard.support import EngineProfile

__all__ = ["profile_of", "trains"]


def trains(engine: Any) -> bool:
    """Whether the engine has an optimizer at all; one without serves inference only."""
    return engine.optimizer is not None and not isinstance(engine.optimizer, DummyOptim)


def profile_of(engine: Any, *, is_first_engine: bool) -> EngineProfile:
    """What `engine` (a `DeepSpeedEngine`, or one derived from it) is made of."""
    precision = "fp16" if engine.fp16_enabled() else "bf16" if engine.bfloat16_enabled() else "fp32"
    return EngineProfile(
        engine_class=type(engine).__name__,
        zero_stage=int(engine.zero_optimization_stage()),
        precision=precision,
        optimizer_class=type(engine.optimizer).__name__,
        optimizer_name=str(engine.optimizer_name() or "").lower(),
        offload=_offload(engine),
        has_moe_layers=bool(engine.has_moe_layers),
        zenflow=bool(engine.zenflow),
        super_offload=bool(engine.super_offload()),
        compiled_zero=bool(engine.is_deepcompile_enabled()),
        quantized_gradients=bool(engine.zero_quantized_gradients()),
        # DeepSpeed counts the stages of a pipeline as model parallel too.
        model_parallel_size=1 if engine.pipeline_parallelism else max(engine.mp_world_size, engine.autotp_size()),
        sequence_parallel_size=int(engine.sequence_parallel_size),
        is_first_engine=is_first_engine,
    )


def _offload(engine: Any) -> str:
    if not engine.zero_optimization():
        return ""
    configs = (engine.zero_offload_optimizer(), engine.zero_offload_param())
    devices = {str(getattr(config.device, "value", config.device)) for config in configs if config is not None}
    return next((device for device in ("nvme", "cpu") if device in devices), "")
