"""DeepSpeed's launcher as we use it: its parsers, the command it would start, its device and core binding.

The runner has no plug-in point, so for the length of one call its module sees another `argparse` (to add options) or
another `subprocess` (to take the command instead of starting it). Both are put back; no file of DeepSpeed's is
touched.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import dataclasses
import difflib
import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from resilience.errors import UsageError

__all__ = [
    "LAUNCH_MODULE",
    "NodeCommand",
    "core_binding",
    "node_parser_arguments",
    "parse_with_options",
    "pid_file",
    "planned_command",
    "runner_module",
    "uses_gpu",
    "visible_devices",
]

LAUNCH_MODULE = "deepspeed.launcher.launch"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class NodeCommand:
    """What DeepSpeed's runner would start: its per-node launcher here, or on all nodes through pdsh."""

    argv: tuple[str, ...]
    environment: Mapping[str, str]

    @property
    def is_remote(self) -> bool:
        """Whether it reaches the nodes over ssh."""
        return self.argv[0] == "pdsh"

    @property
    def world(self) -> dict[str, list[int]]:
        """Slots to use, by node, in hostfile order."""
        decoded: dict[str, list[int]] = json.loads(base64.urlsafe_b64decode(self._value("--world_info")))
        return decoded

    @property
    def master_addr(self) -> str:
        """Address of the first node."""
        return self._value("--master_addr")

    def _value(self, option: str) -> str:
        return next(word.partition("=")[2] for word in self.argv if word.startswith(f"{option}="))

    def with_launcher(self, module: str, *arguments: str) -> NodeCommand:
        """The same command with another per-node launcher, given `arguments` before DeepSpeed's own."""
        at = self.argv.index(LAUNCH_MODULE)
        return dataclasses.replace(self, argv=(*self.argv[:at], module, *arguments, *self.argv[at + 1 :]))


def runner_module() -> Any:
    """DeepSpeed's runner."""
    from deepspeed.launcher import runner

    return runner


def parse_with_options(
    runner: ModuleType, add_options: Callable[[argparse.ArgumentParser], None]
) -> Callable[[Sequence[str] | None], argparse.Namespace]:
    """A `parse_args` for DeepSpeed's runner that knows more options.

    A line that names one of ours gets our kind of complaint, a `UsageError`; others get DeepSpeed's own.
    """
    stock = runner.parse_args

    class Parser(argparse.ArgumentParser):
        def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
            self._is_ours = any(word.startswith("--resilience") for word in (sys.argv[1:] if args is None else args))
            add_options(self)
            return super().parse_args(args, namespace)

        def error(self, message: str) -> NoReturn:
            if self._is_ours:
                raise UsageError(_complaint(message, self._option_string_actions))
            super().error(message)

    def parse_args(args: Sequence[str] | None = None) -> argparse.Namespace:
        with _replaced(runner, "argparse", _Overlay(argparse, ArgumentParser=Parser)):
            namespace: argparse.Namespace = stock(args)
        return namespace

    return parse_args


def _complaint(message: str, options: Iterable[str]) -> str:
    """argparse's `message`, with the option that was probably meant."""
    unknown = next((word for word in message.split() if word.startswith("-")), "")
    close = difflib.get_close_matches(unknown, list(options), n=1) if message.startswith("unrecognized") else []
    hint = f"did you mean {close[0]}?" if close else "see `deepspeed --help`"
    return f"{message}; {hint}"


def planned_command(
    runner: ModuleType, main: Callable[[Sequence[str] | None], None], args: Sequence[str] | None
) -> NodeCommand:
    """Let DeepSpeed's own `main` work until the command that it would start, and take that command instead."""

    def take(argv: Sequence[str], env: Mapping[str, str]) -> NoReturn:
        raise _TakenError(NodeCommand(argv=tuple(argv), environment=dict(env)))

    with _replaced(runner, "subprocess", _Overlay(subprocess, Popen=take)):
        try:
            main(args)
        except _TakenError as taken:
            return taken.command
    raise AssertionError("DeepSpeed's runner returned without starting anything")


@contextlib.contextmanager
def _replaced(module: ModuleType, name: str, value: Any) -> Iterator[None]:
    """`module.name` is `value` inside, and what it was before outside."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


class _TakenError(Exception):
    def __init__(self, command: NodeCommand) -> None:
        super().__init__(command)
        self.command = command


class _Overlay:
    """A module with some of its names replaced."""

    def __init__(self, module: ModuleType, **names: Any) -> None:
        self.__dict__.update(names)
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def node_parser_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parse what DeepSpeed's per-node launcher takes, with its own parser, and set its log level as it would."""
    from deepspeed.launcher import launch
    from deepspeed.utils import set_log_level_from_string

    with _replaced(sys, "argv", [LAUNCH_MODULE, *argv]):
        namespace: argparse.Namespace = launch.parse_args()
    set_log_level_from_string("error" if namespace.quiet else namespace.log_level)
    return namespace


def uses_gpu() -> bool:
    """Whether DeepSpeed's accelerator on this node is a CUDA device."""
    from deepspeed.accelerator import get_accelerator

    return bool(get_accelerator().device_name() == "cuda")


def pid_file(save_pid: int) -> Path:
    """Where `--save_pid` expects the pid of the node's launcher."""
    from deepspeed.launcher import launch

    return Path(launch.PID_FILE_BASEPATH) / f"{save_pid}.deepspeed"


def visible_devices(slots: Sequence[int]) -> dict[str, str]:
    """The variables that make exactly these slots of the node visible."""
    from deepspeed.accelerator import get_accelerator

    environment: dict[str, str] = {}
    get_accelerator().set_visible_devices_envs(environment, list(slots))
    return environment


def core_binding(core_list: str | None, *, num_local_ranks: int, local_rank: int) -> tuple[int, list[str]]:
    """Cores per rank, and the words in front of the rank's command that bind it to its own."""
    from deepspeed.utils import get_numactl_cmd

    cores, command = get_numactl_cmd(core_list, num_local_ranks, local_rank)
    return int(cores), list(command)
