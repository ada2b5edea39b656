"""A process of its own that converts one checkpoint: DeepSpeed's conversion, and a comparison of what came of it.

    python -m resilience.deepspeed.convert_process SOURCE TARGET PARENT_PID

A process, because the conversion wants memory and prints, and because a rank that goes on must not be left with what
it did. The last line on standard error says what went wrong. It ends when its parent does.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from deepspeed.checkpoint import ds_to_universal

from resilience.deepspeed.sharded import KINDS, MASTER, Sharded, bits
from resilience.errors import CheckpointError
from resilience.launch.processes import die_with_parent

__all__: list[str] = []


def main(source: Path, target: Path) -> None:
    """Convert `source`, whose files were verified, into the new folder `target`.

    Raises:
        CheckpointError: it cannot be converted, or came out different.
    """
    sharded = Sharded(source)
    sharded.steps()
    target.mkdir()
    ds_to_universal.main(
        argparse.Namespace(
            input_folder=str(source),
            output_folder=str(target),
            num_extract_workers=1,  # with more it forks processes that nobody would end if this one were killed
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,
        )
    )
    _compare(sharded, target)


def _compare(sharded: Sharded, target: Path) -> None:
    """Hold every tensor of the result against the shards, and every count of steps."""
    for name, numel in sharded.numels.items():
        for kind in KINDS:
            made = _made(target / "zero" / name / f"{kind}.pt")
            whole = made["param"] if isinstance(made, dict) else made
            if not torch.equal(bits(whole), bits(sharded.read(kind, name))):
                raise CheckpointError(f"DeepSpeed's conversion changed {kind} of {name} ({numel} elements)")
    steps = set(sharded.steps())
    for name in sharded.numels:
        path = target / "zero" / name / "step.pt"
        if path.exists() and float(_made(path)) not in steps:
            raise CheckpointError(f"DeepSpeed's conversion changed the number of steps of {name}")


def _made(path: Path) -> Any:
    if not path.exists():
        what = "master" if path.stem == MASTER else path.stem
        raise CheckpointError(f"DeepSpeed's conversion lost the {what} of {path.parent.name}")
    return torch.load(path, map_location="cpu", mmap=True, weights_only=False)


if __name__ == "__main__":
    if die_with_parent(signal.SIGKILL, parent_pid=int(sys.argv[3])):
        try:
            main(Path(sys.argv[1]), Path(sys.argv[2]))
        except CheckpointError as error:
            sys.exit(str(error))
