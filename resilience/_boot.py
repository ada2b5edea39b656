"""What the package's `.pth` line runs at the start of an interpreter: decides whether this process is ours.

The line itself (see setup.py) looks at the command line and the environment first, so that other processes do not even
import this module. It must import nothing beyond `os` and `sys`, and must change nothing in processes that are neither
DeepSpeed's runner with one of our options on its command line, nor a rank that our agent started. In those two it puts
a finder in front of `sys.meta_path` that waits for one module and acts right after that module was executed.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False  # `typing` costs two milliseconds; type checkers know this name
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

__all__ = ["arm"]

RUNNER = "deepspeed.launcher.runner"
RUNNER_COMMANDS = frozenset({"deepspeed", "deepspeed.pt", "ds"})
HELP = frozenset({"-h", "--help"})


def arm() -> None:
    """Put the hook in place that this process needs, if it needs one."""
    if "RESILIENCE_CONTEXT" in os.environ:
        if "RANK" in os.environ:
            sys.meta_path.insert(0, _AfterImport("deepspeed", install_in_rank))
    elif _is_runner(sys.orig_argv) and _mentions_us(sys.orig_argv):
        sys.meta_path.insert(0, _AfterImport(RUNNER, _extend_runner))


def _is_runner(command: list[str]) -> bool:
    """Whether `command` starts DeepSpeed's runner, as a console script or with `-m`."""
    position = 1
    while position < len(command) and command[position].startswith("-"):
        option = command[position]
        if option == "-m":
            return command[position + 1 : position + 2] == [RUNNER]
        if option.startswith("-m"):
            return option[2:] == RUNNER
        if option == "-c":
            return False
        position += 2 if option in ("-W", "-X", "--check-hash-based-pycs") else 1
    return position < len(command) and os.path.basename(command[position]) in RUNNER_COMMANDS


def _mentions_us(command: list[str]) -> bool:
    return any(word in HELP or word.startswith("--resilience") for word in command)


def _extend_runner(module: Any) -> None:
    from resilience.launch.runner import extend

    extend(module)


def install_in_rank(module: Any) -> None:
    from resilience.context import RunContext
    from resilience.deepspeed import hook
    from resilience.errors import ResilienceError

    try:
        context = RunContext.from_environment(os.environ)
    except ResilienceError as error:
        print(f"resilience: {error}", file=sys.stderr)
        sys.exit(int(error.exit_code))
    assert context is not None, "armed without RESILIENCE_CONTEXT"
    hook.install(context)


class _AfterImport:
    """A finder that calls `then(module)` once, after the module `name` was executed."""

    def __init__(self, name: str, then: Callable[[Any], None]) -> None:
        self._name = name
        self._then = then
        self._searching = False

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != self._name or self._searching:
            return None
        self._searching = True
        try:
            spec = _find_elsewhere(name, path, target)
        finally:
            self._searching = False
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self._executed)
        return spec

    def _executed(self, module: Any) -> None:
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        self._then(module)


def _find_elsewhere(name: str, path: Any, target: Any) -> Any:
    """What the import system would have found without us."""
    for finder in sys.meta_path:
        find = getattr(finder, "find_spec", None)
        if find is not None and (spec := find(name, path, target)) is not None:
            return spec
    return None


class _Loader:
    """A module's own loader, with a call after the execution. Everything else is passed through."""

    def __init__(self, loader: Any, executed: Callable[[Any], None]) -> None:
        self._loader = loader
        self._executed = executed

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: Any) -> Any:
        return self._loader.create_module(spec)

    def exec_module(self, module: Any) -> None:
        module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        self._executed(module)

    def get_code(self, name: str) -> Any:
        """For `python -m`, which executes the code itself: import the module, so that the hook acts; run its main."""
        return compile(f"from {name} import main\nmain()\n", f"<{name}>", "exec")
