"""A light load: weights, scheduler, counters and client state of a checkpoint, without its optimizer's shards.

Where the script will be led to a memory snapshot, that brings masters and moments of its own; the shards, most of a
checkpoint's bytes, would be read, verified and thrown away. What a script can see of the optimizer until then are its
hyperparameters (a learning rate in a log): they are kept beside the random states, and come back.

Written against DeepSpeed 0.19.8 (`versions.py`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["HYPERPARAMETERS", "capture", "is_shard", "is_supported", "restore", "without_shards"]

HYPERPARAMETERS = "hyperparameters"
"""Key of what `capture` gives in the file of a rank's random states."""

_SCALARS = (bool, int, float, str, type(None))


def is_supported(engine: Any, options: Mapping[str, Any]) -> bool:
    """Whether DeepSpeed can load without the shards: with ZeRO-3 they are the weights, too; with fp16 they hold the
    loss scale; experts have files of their own.

    Args:
        engine: the engine that loads.
        options: the arguments of `load_checkpoint`, by name.
    """
    return (
        engine.zero_optimization_stage() in (1, 2)
        and not engine.fp16_enabled()
        and not engine.has_moe_layers
        and options["custom_load_fn"] is None
    )


def is_shard(path: str) -> bool:
    """Whether a file of a checkpoint holds the optimizer's share of one rank."""
    return path.endswith("_optim_states.pt")


def capture(engine: Any) -> list[dict[str, Any]] | None:
    """The hyperparameters of every group of the optimizer; None where they are more than numbers and words."""
    groups = [
        {name: value for name, value in group.items() if name != "params"}
        for group in getattr(engine.optimizer, "param_groups", [])
    ]
    values = [value for group in groups for value in group.values()]
    return groups if all(_is_plain(value) for value in values) else None


def restore(engine: Any, groups: list[dict[str, Any]]) -> None:
    """Give the optimizer's groups the hyperparameters that `capture` found, read back from JSON."""
    for group, saved in zip(engine.optimizer.param_groups, groups, strict=True):
        for name, value in saved.items():
            # JSON knows no tuples; DeepSpeed's own optimizers keep the lists of its configuration.
            of_torch = isinstance(value, list) and not isinstance(group.get(name), list)
            group[name] = tuple(value) if of_torch else value


@contextlib.contextmanager
def without_shards(engine: Any) -> Iterator[None]:
    """A load within takes masters from the weights, as DeepSpeed does where a checkpoint has no shards."""
    engine.__dict__["_load_zero_checkpoint"] = lambda *_args, **_kwargs: False
    try:
        yield
    finally:
        del engine.__dict__["_load_zero_checkpoint"]


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(isinstance(item, _SCALARS) for item in value)
    return isinstance(value, _SCALARS)
