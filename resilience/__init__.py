"""A resilience service for DeepSpeed training: detect, decide, recover, prove.

`import resilience` costs nothing and changes nothing; the names below load what they need when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Config", "__version__", "coverage", "load_config", "protect"]

if TYPE_CHECKING:
    from resilience.abft.coverage import coverage
    from resilience.config import Config, load_config
    from resilience.guard import protect

_HOMES = {
    "Config": "resilience.config",
    "coverage": "resilience.abft.coverage",
    "load_config": "resilience.config",
    "protect": "resilience.guard",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(home), name)
