"""What each rank of a node runs, in which environment, with which logs: everything that DeepSpeed's launcher would set.

The plan of a generation is a file beside its logs. It holds nothing secret and stays there: it shows what was started.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from resilience.context import (
    ARENA_VARIABLE,
    CONTEXT_VARIABLE,
    DEVICE_VARIABLE,
    GENERATION_VARIABLE,
    NODE_VARIABLE,
    RESTORE_VARIABLE,
    RunContext,
)
from resilience.deepspeed.launcher import core_binding, visible_devices
from resilience.events import Mode
from resilience.rpc.v1 import coordinator_pb2 as pb

__all__ = ["RankFiles", "last_line", "plan_ranks", "write_plan"]

_RANK_PREFIX = re.compile(r"^\[rank\d+\]:")
"""torch puts it in front of each line of a traceback, once the process group is up."""
_TAIL_BYTES = 8192
_MESSAGE_CHARACTERS = 300


@dataclasses.dataclass(frozen=True, slots=True)
class RankFiles:
    """Where the output of one rank goes."""

    out: Path
    err: Path
    log: Path | None
    """Both streams in one file, where `--enable_each_rank_log` asks for it; the other two stay empty then."""

    @classmethod
    def of(cls, directory: Path, rank: int, *, each_rank_log: Path | None) -> RankFiles:
        return cls(directory / f"rank-{rank}.out", directory / f"rank-{rank}.err", each_rank_log)


def plan_ranks(
    arguments: argparse.Namespace,
    *,
    context: RunContext,
    context_path: Path,
    node: str,
    assignment: pb.Assignment,
    devices: Sequence[pb.Device],
    each_rank_logs: Sequence[Path | None],
    arena: Path | None = None,
    restore: Path | None = None,
) -> dict[str, Any]:
    """Command, environment and log of each rank that this node starts for `assignment`.

    Args:
        arguments: those of DeepSpeed's per-node launcher.
        context: the run.
        context_path: where ranks find it.
        node: this node's name in the hostfile.
        assignment: its place in the generation.
        devices: one for each slot of the assignment, in its order.
        each_rank_logs: as `RankFiles.log`, for each rank.
        arena: this node's arena; None where there is no memory tier.
        restore: the folder in it that was prepared for this generation, if any was.
    """
    num_local = len(assignment.slots)
    shared = {
        **visible_devices(assignment.slots),
        "CROSS_RANK": str(assignment.node_index),
        "CROSS_SIZE": str(assignment.num_nodes),
        "LOCAL_SIZE": str(num_local),
        GENERATION_VARIABLE: str(assignment.generation),
        NODE_VARIABLE: node,
    }
    if context.config.mode is not Mode.OFF:
        shared[CONTEXT_VARIABLE] = str(context_path)
    folders = {ARENA_VARIABLE: arena, RESTORE_VARIABLE: restore}
    shared |= {variable: str(folder) for variable, folder in folders.items() if folder is not None}
    ranks = []
    for local_rank in range(num_local):
        environment = {**shared, DEVICE_VARIABLE: devices[local_rank].device}
        binding: list[str] = []
        if arguments.bind_cores_to_rank:
            cores, binding = core_binding(arguments.bind_core_list, num_local_ranks=num_local, local_rank=local_rank)
            environment["OMP_NUM_THREADS"] = str(cores)
        log = each_rank_logs[local_rank]
        ranks.append(
            {
                "command": [*binding, *_command(arguments, local_rank)],
                "environment": environment,
                "log": None if log is None else str(log),
            }
        )
    return {"generation": assignment.generation, "first_rank": assignment.first_rank, "ranks": ranks}


def _command(arguments: argparse.Namespace, local_rank: int) -> list[str]:
    """The script's command line, as DeepSpeed's launcher builds it."""
    command = [] if arguments.no_python else [sys.executable, "-u"]
    if arguments.module:
        command.append("-m")
    command.append(arguments.training_script)
    if not arguments.no_local_rank:
        command.append(f"--local_rank={local_rank}")
    return [*command, *arguments.training_script_args]


def write_plan(path: Path, plan: dict[str, Any]) -> None:
    """Write the plan for the shims to read."""
    path.write_text(json.dumps(plan, indent=2), encoding="utf-8")


def last_line(path: Path) -> str:
    """What happened, from what a rank wrote to `path`: the exception of its last traceback; empty if there is none."""
    try:
        with path.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - _TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except FileNotFoundError:
        return ""
    written = [_RANK_PREFIX.sub("", line).strip() for line in lines if line.strip()]
    return _exception_line(written)[:_MESSAGE_CHARACTERS]


def _exception_line(lines: Sequence[str]) -> str:
    """Of the last traceback the line after its frames; where there is none, nothing: other output is no reason."""
    for start in range(len(lines) - 1, -1, -1):
        if lines[start].startswith("Traceback (most recent call last)"):
            break
    else:
        return ""
    for line in lines[start + 1 :]:
        name = line.split(":", maxsplit=1)[0].strip()
        looks_like_exception = name.replace(".", "").isidentifier() and name.rpartition(".")[2][:1].isupper()
        if looks_like_exception and " " not in name:
            return line
    return ""
