"""`train_tiny.py` with bad luck: before a step the whole state grows, unseen by any hash, and while the damage is gone
back from a rank is killed. Both happen once: a file in the working directory remembers.
"""

import os
import runpy
import signal
from pathlib import Path
from typing import Any

import deepspeed

STEP = 15
MARK = Path("killed")


def main() -> None:
    initialize = deepspeed.initialize

    def remember(*args: Any, **kwargs: Any) -> Any:
        made = initialize(*args, **kwargs)
        made[0].register_forward_pre_hook(lambda *_: grow(made[0]))
        return made

    deepspeed.initialize = remember
    kill_in_the_middle()
    runpy.run_module("train_tiny", run_name="__main__")


def grow(engine: Any) -> None:
    if engine.global_steps + 1 != STEP or MARK.exists() or getattr(engine, "has_grown", False):
        return
    engine.has_grown = True
    for tensor in (*engine.module.parameters(), *engine.optimizer.single_partition_of_fp32_groups):
        tensor.data.mul_(2.0)


def kill_in_the_middle() -> None:
    """Rank 1 dies when it makes sure that the way back is open: nobody has given up anything by then."""
    if "RESILIENCE_CONTEXT" not in os.environ:
        return
    from resilience.guard.rewind import Rewinder

    prepare = Rewinder._prepare

    def die_once(self: Any, step: int) -> str:
        if int(os.environ["RANK"]) == 1 and not MARK.exists():
            MARK.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return prepare(self, step)

    Rewinder._prepare = die_once


if __name__ == "__main__":
    main()
