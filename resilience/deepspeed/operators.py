"""DeepSpeed's operators that are compiled when they are first used: loading those by name that a run uses."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["load"]


def load(names: Iterable[str]) -> None:
    """Load compiled operators into this process, as `deepspeed.initialize` would later.

    Args:
        names: of their builders, such as `deepspeed_shm_comm`; an unknown one is left for the script.
    """
    from deepspeed.ops.op_builder.all_ops import ALL_OPS

    for name in names:
        builder = ALL_OPS.get(name)
        if builder is not None:
            builder.load()
