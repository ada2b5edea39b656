"""Keeping the samples of an optimizer step when an engine has another number of ranks than the one that saved.

A configuration that fixes the micro-batch and the accumulation would change them with the number of ranks, without a
word. The accumulation follows instead, before the first step.
"""

from __future__ import annotations

from typing import Any

from resilience.checkpoint.batch import Batch, rescale
from resilience.errors import CheckpointError

__all__ = ["batch_of", "keep_batch"]

_STATED = "train_batch_size"
_PARTS = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


def batch_of(engine: Any) -> Batch | None:
    """What an engine is configured for; None where DeepSpeed's three numbers do not make a batch."""
    try:
        return Batch(
            train_batch_size=int(engine.train_batch_size()),
            micro_batch_size=int(engine.train_micro_batch_size_per_gpu()),
            accumulation=int(engine.gradient_accumulation_steps()),
            world_size=int(engine.dp_world_size),
        )
    except ValueError:
        return None


def keep_batch(engine: Any, saved: Batch) -> str:
    """Let each optimizer step of `engine` take as many samples as when the checkpoint was saved.

    Returns:
        What was done, in words; empty if there was nothing to do.

    Raises:
        CheckpointError: that cannot be done; the line names the values and what would help.
    """
    here = batch_of(engine)
    if here is None or here.world_size == saved.world_size:
        return ""
    if here.train_batch_size == saved.train_batch_size:
        return f"an optimizer step takes as many samples as before: {here}"
    if _states_the_whole(engine):
        return f"the configuration says {here}; it was {saved.train_batch_size} when the checkpoint was saved"
    wanted = rescale(saved, here.world_size, micro_batch_size=here.micro_batch_size)
    _refuse_own_boundaries(engine, wanted, engine._is_gradient_accumulation_boundary is not None)
    engine.set_train_batch_size(wanted.train_batch_size)
    if hasattr(engine.optimizer, "gradient_accumulation_steps"):
        engine.optimizer.gradient_accumulation_steps = wanted.accumulation
    engine.tput_timer.batch_size = wanted.train_batch_size
    _watch_boundaries(engine, wanted)
    return f"an optimizer step takes as many samples as before: {wanted}, in place of accumulation {here.accumulation}"


def _states_the_whole(engine: Any) -> bool:
    """Whether the configuration names train_batch_size, and DeepSpeed derived one of the other two from it."""
    stated = engine._config._param_dict
    return stated.get(_STATED) is not None and any(stated.get(name) is None for name in _PARTS)


def _watch_boundaries(engine: Any, wanted: Batch) -> None:
    """A script may decide itself when a step is taken (as Accelerate does), which is seen at its first micro-batch."""

    def refuse(is_boundary: bool) -> None:
        del is_boundary
        _refuse_own_boundaries(engine, wanted, True)

    engine.__dict__["set_gradient_accumulation_boundary"] = refuse


def _refuse_own_boundaries(engine: Any, wanted: Batch, sets_them: bool) -> None:
    if sets_them or not engine.managed_gradient_accumulation():
        raise CheckpointError(
            f"{wanted.world_size} ranks need an accumulation of {wanted.accumulation} micro-batches to keep "
            f"train_batch_size {wanted.train_batch_size}, and the script decides itself when a step is taken: set "
            f"gradient_accumulation_steps to {wanted.accumulation} in the script and in the configuration"
        )
