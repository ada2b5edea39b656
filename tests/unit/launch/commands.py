"""Executed by test_commands.py in a process of its own: prints what DeepSpeed's runner would start, as JSON lines.

commands.py stock|extended|planned < one JSON list of arguments per line
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from deepspeed.launcher import runner

from resilience.deepspeed.launcher import planned_command
from resilience.launch.runner import extend


class StartedError(Exception):
    """What was started."""


class Recorder:
    """Stands where `subprocess` was; any start ends the runner."""

    DEVNULL = None

    @staticmethod
    def Popen(argv: Sequence[str], env: Mapping[str, str]) -> Any:
        raise StartedError(list(argv), dict(env))


def started(arguments: list[str]) -> Any:
    """Argument list and environment of the command, or how the runner ended instead."""
    try:
        runner.main(arguments)
    except StartedError as command:
        return command.args
    except (SystemExit, ValueError, AssertionError) as error:
        return [type(error).__name__, str(error)]
    return ["nothing"]


def main() -> None:
    kind = sys.argv[1]
    stock = runner.parse_args, runner.main
    if kind != "planned":
        runner.subprocess = Recorder
    for line in sys.stdin:
        runner.parse_args, runner.main = stock
        arguments = json.loads(line)
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        if kind == "planned":
            command = planned_command(runner, runner.main, arguments)
            ours = command.with_launcher("resilience.launch.node", "--resilience-context", "/run/context.json")
            answer: Any = [list(command.argv), list(ours.argv), command.is_remote, command.world, command.master_addr]
        else:
            if kind == "extended":
                extend(runner)
            answer = started(arguments)
        assert runner.argparse is argparse, "the overlay must be gone"
        print("ANSWER " + json.dumps(answer))


if __name__ == "__main__":
    main()
