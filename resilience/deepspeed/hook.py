"""Where the guard gets hold of engines: it wraps `deepspeed.initialize`, reversibly and version-checked."""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable
from typing import Any

import deepspeed

from resilience.config import Config
from resilience.context import RunContext
from resilience.deepspeed.profile import trains
from resilience.deepspeed.versions import require_tested_version
from resilience.errors import ResilienceError
from resilience.events import Mode
from resilience.guard.assembly import Guarded, guard_engine

__all__ = ["guarded", "install", "protect", "release"]

_log = logging.getLogger(__name__)

_guarded: dict[int, tuple[Any, Guarded]] = {}
"""Engines under guard in this process, by id; the engine itself is kept so that the id stays its own."""


def install(context: RunContext) -> Callable[[], None]:
    """Wrap `deepspeed.initialize`, so that the engine that it returns is under guard.

    Args:
        context: the run that this process belongs to.

    Returns:
        What puts `deepspeed.initialize` back.
    """
    if context.config.mode is Mode.OFF:
        return lambda: None
    _or_exit(require_tested_version, deepspeed.__version__)
    initialize = deepspeed.initialize

    @functools.wraps(initialize)
    def guarded_initialize(*args: Any, **kwargs: Any) -> Any:
        returned = initialize(*args, **kwargs)
        _or_exit(protect, returned[0], context)
        return returned

    deepspeed.initialize = guarded_initialize

    def uninstall() -> None:
        if deepspeed.initialize is guarded_initialize:
            deepspeed.initialize = initialize

    return uninstall


def protect(engine: Any, settings: Config | RunContext | None = None, **kwargs: Any) -> Any:
    """Put one engine under guard; see `resilience.protect`. Further arguments go to `guard_engine`."""
    require_tested_version(deepspeed.__version__)
    context = settings if isinstance(settings, RunContext) else None
    config = context.config if context is not None else settings if isinstance(settings, Config) else Config()
    if config.mode is Mode.OFF or id(engine) in _guarded or not trains(engine):
        return engine
    if _guarded:
        _log.warning("replay off: a second engine in the same process is not protected; only the first one is")
        return engine
    versions = {"deepspeed": deepspeed.__version__}
    _guarded[id(engine)] = (engine, guard_engine(engine, config, context=context, versions=versions, **kwargs))
    return engine


def guarded(engine: Any) -> Guarded | None:
    """The guard of `engine`, if it has one."""
    entry = _guarded.get(id(engine))
    return entry[1] if entry is not None else None


def release(engine: Any) -> None:
    """Take the guard off `engine`."""
    entry = _guarded.pop(id(engine), None)
    if entry is not None:
        entry[1].uninstall()


def _or_exit(function: Callable[..., Any], *args: Any) -> None:
    """Call `function`; an error for people ends the process with one line and its code, without a traceback."""
    try:
        function(*args)
    except ResilienceError as error:
        print(f"resilience: {error}", file=sys.stderr, flush=True)
        sys.exit(int(error.exit_code))  # not raised by hand: its code is noted on the way (guard/ending.py)
