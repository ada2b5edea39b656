"""What each module offers: `__all__` is there, true and tidy, and the package's own names load when they are used."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import resilience

PACKAGE = Path(resilience.__file__).parent
GENERATED = PACKAGE / "rpc" / "v1"


def module_names() -> list[str]:
    """Every module that is imported by others: not generated, not private, not run as a program."""
    names = []
    for path in sorted(PACKAGE.rglob("*.py")):
        if GENERATED in path.parents or path.name == "__main__.py":
            continue
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return [name for name in names if not name.rpartition(".")[2].startswith("_")]


@pytest.mark.parametrize("name", module_names())
def test_all_is_there_and_true(name: str) -> None:
    module = importlib.import_module(name)
    if Path(str(module.__file__)).name == "__init__.py" and not hasattr(module, "__all__"):
        public = [word for word, value in vars(module).items() if not word.startswith("_") and callable(value)]
        assert not public, f"{name} offers {public} but has no __all__"
        return
    assert hasattr(module, "__all__"), f"{name} has no __all__"
    assert len(set(module.__all__)) == len(module.__all__)
    for word in module.__all__:
        assert hasattr(module, word), f"{name}.__all__ names {word!r}, which does not exist"


def test_unknown_names_are_refused() -> None:
    with pytest.raises(AttributeError, match="no attribute 'guardian'"):
        _ = resilience.guardian  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["resilience", "resilience.coordinator", "resilience.cli.main", "resilience.faults"])
def test_works_without_torch(name: str) -> None:
    program = f"""
import sys
for absent in ("torch", "deepspeed", "numpy"):
    sys.modules[absent] = None
import {name}
"""
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert answer.returncode == 0, answer.stderr
