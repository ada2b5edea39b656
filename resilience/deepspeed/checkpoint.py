"""Verified checkpoints around DeepSpeed's own: the only place that wraps save_checkpoint and load_checkpoint.

What happens then is in `checkpoint_save` and `checkpoint_load`. Both are collective, as DeepSpeed's are. Nothing here
decides about a step, and nothing is ever removed from a save_dir.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable
from typing import Any

import torch.distributed

from resilience.clock import Clock, SystemClock
from resilience.context import NODE_VARIABLE, RunContext
from resilience.deepspeed.checkpoint_load import Loader
from resilience.deepspeed.checkpoint_save import Saver
from resilience.deepspeed.checkpoint_setting import GuardState, Led, Reporter, Setting, Share
from resilience.events import Mode

__all__ = ["GuardState", "Reporter", "install"]

_log = logging.getLogger(__name__)


def install(
    engine: Any,
    *,
    context: RunContext,
    client: Reporter,
    guard_state: GuardState,
    led: Led | None = None,
    clock: Clock | None = None,
) -> Callable[[], None]:
    """Wrap an engine's save_checkpoint and load_checkpoint.

    Args:
        engine: a DeepSpeedEngine; the default process group is up.
        context: the run. With `checkpoint.verify` off, or in mode `off`, nothing is wrapped.
        client: gets a `CheckpointFact` for each publication, load and refusal, on rank 0.
        guard_state: read for the generation and the last verified step; told which step was loaded.
        led: what leads a restarted script to a memory snapshot, if anything does.
        clock: for the times in manifests and facts.

    Returns:
        What takes the wrapping off again.
    """
    if not context.config.checkpoint.verify or context.config.mode is Mode.OFF:
        return lambda: None
    if engine.checkpoint_engine.is_decoupled():
        name = type(engine.checkpoint_engine).__name__
        _log.warning("verified checkpoints off: %s writes in the background; use the torch checkpoint engine", name)
        return lambda: None
    clock = clock or SystemClock()
    setting = Setting(
        engine=engine,
        run_id=context.run_id,
        enforce=context.config.mode is Mode.ENFORCE,
        client=client,
        guard_state=guard_state,
        clock=clock,
        started_at=clock.wall(),
        rank=torch.distributed.get_rank(),
        world_size=torch.distributed.get_world_size(),
        share=_share(engine),
        led=led,
    )
    before = {name: vars(engine).get(name) for name in ("save_checkpoint", "load_checkpoint")}
    engine.save_checkpoint = Saver(setting, engine.save_checkpoint).save
    engine.load_checkpoint = Loader(setting, engine.load_checkpoint).load

    def uninstall() -> None:
        for name, value in before.items():
            if value is None:
                delattr(engine, name)
            else:
                setattr(engine, name, value)

    return uninstall


def _share(engine: Any) -> Share:
    if engine.use_node_local_storage():
        node = os.environ.get(NODE_VARIABLE) or socket.gethostname()
        return Share(index=int(os.environ["LOCAL_RANK"]), count=int(os.environ["LOCAL_WORLD_SIZE"]), node=node)
    return Share(index=torch.distributed.get_rank(), count=torch.distributed.get_world_size(), node=None)
