"""What a rank had imported after its first step, in a file that its agent reads: a standby process imports the same.

Only installed modules are noted, never the script's own: a script may change between two generations of its ranks.
Beside them stand the names, not the values, of the environment variables that the script had changed by then.
"""

from __future__ import annotations

import dataclasses
import json
import os
import site
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import resilience

__all__ = ["ImportNote", "Imported", "path_of", "read", "shared_name"]

_RANK_VARIABLES = frozenset(
    {
        *("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME", "CROSS_RANK"),
        *("WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE", "CROSS_SIZE", "LOCAL_SIZE"),
        *("MASTER_ADDR", "MASTER_PORT"),
    }
)
_RANK_PREFIXES = ("TORCHELASTIC_", "RESILIENCE_")


def shared_name(name: str) -> bool:
    """Whether an environment variable has one value for all ranks and generations of a run."""
    return name not in _RANK_VARIABLES and not name.startswith(_RANK_PREFIXES)


@dataclasses.dataclass(frozen=True, slots=True)
class Imported:
    """What a standby process needs to know."""

    modules: tuple[str, ...]
    """Names, in the order in which they were first imported."""
    operators: tuple[str, ...]
    """Of DeepSpeed's compiled operators those that were loaded, by their builders' names."""
    changed_variables: tuple[str, ...]
    """Environment variables with another value than the process was started with."""


def path_of(run_dir: Path, node: str) -> Path:
    """Where a node's rank writes and its agent reads."""
    return run_dir / "logs" / f"imported-{node}.json"


def read(path: Path) -> Imported | None:
    """What is noted at `path`; None while nothing is."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return Imported(tuple(content["modules"]), tuple(content["operators"]), tuple(content["changed_variables"]))


class ImportNote:
    """Told of each micro-step as it begins; writes the note when the second step begins, once.

    It is for processes that were started afresh: what they were started with is read from the kernel.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._first_step: int | None = None
        self._is_written = False

    def begin(self, step: int, micro_step: int, attempt: int) -> None:
        """A micro-step begins."""
        if self._is_written:
            return
        if self._first_step is None:
            self._first_step = step
        if step > self._first_step:
            self._is_written = True
            self._write()

    def _write(self) -> None:
        started_with = _initial_environment()
        note = Imported(
            modules=installed_modules(dict(sys.modules)),
            operators=_operators(),
            changed_variables=tuple(
                sorted(name for name in {*os.environ, *started_with} if os.environ.get(name) != started_with.get(name))
            ),
        )
        temporary = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        temporary.write_text(json.dumps(dataclasses.asdict(note)), encoding="utf-8")
        temporary.replace(self._path)


def installed_modules(modules: Mapping[str, ModuleType]) -> tuple[str, ...]:
    """Of `modules` the names of those that lie where packages are installed, the standard library, or this package."""
    paths = sysconfig.get_paths()
    roots = {paths["stdlib"], paths["platstdlib"], paths["purelib"], paths["platlib"], *site.getsitepackages()}
    roots |= {site.getusersitepackages(), str(Path(resilience.__file__).parent)}
    prefixes = tuple(f"{root}{os.sep}" for root in roots)
    found = []
    for name, module in modules.items():
        spec = getattr(module, "__spec__", None)
        origin = getattr(spec, "origin", None)
        # A module that was put there under another name than its own cannot be imported by that name.
        if isinstance(origin, str) and origin.startswith(prefixes) and getattr(spec, "name", None) == name:
            found.append(name)
    return tuple(found)


def _operators() -> tuple[str, ...]:
    builder = sys.modules.get("deepspeed.ops.op_builder.builder")
    return () if builder is None else tuple(builder.OpBuilder._loaded_ops)


def _initial_environment() -> dict[str, str]:
    """The environment that the kernel gave this process."""
    pairs = Path("/proc/self/environ").read_bytes().split(b"\0")
    return {
        os.fsdecode(name): os.fsdecode(value) for name, _, value in (pair.partition(b"=") for pair in pairs if pair)
    }
