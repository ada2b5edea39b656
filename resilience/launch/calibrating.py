"""`resilience calibrate`: one run in shadow mode that keeps histograms of its residuals. The job itself is the user's.

The command line goes to `deepspeed --resilience` as it is, but for the configuration: what the user's file says, with
everything checked, nothing acted on, and the thresholds as they are without a profile.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from resilience.config import load_config
from resilience.errors import UsageError
from resilience.launch.run_directory import default_directory

__all__ = ["run_calibrating"]

_CONFIG = "--resilience-config"
_DIRECTORY = "--resilience-dir"
_OURS: dict[str, Any] = {
    "mode": "shadow",
    "detection": {"calibrate": True, "share": 1.0, "threshold_scale": 1.0, "profile": None},
}


def run_calibrating(arguments: Sequence[str], *, quiet: bool) -> tuple[int, Path]:
    """Run the job to its end; its exit code, and the directory of the run.

    Args:
        arguments: what would follow `deepspeed --resilience`.
        quiet: keep standard output free: what the job prints goes to standard error.

    Raises:
        UsageError: there is no job, or its configuration checks nothing.
    """
    if not arguments:
        raise UsageError("no job to run; put its command line after `--`: resilience calibrate -- train.py …")
    given, rest = _taken([word for word in arguments if word != "--resilience"], _CONFIG)
    directory, rest = _taken(rest, _DIRECTORY)
    run_dir = default_directory(f"calibrate-{os.getpid()}") if directory is None else Path(directory).absolute()
    config = load_config(None if given is None else Path(given))
    if config.detection.strength in ("off", "screen"):
        raise UsageError(
            f"detection.strength = {config.detection.strength!r} has no thresholds of this kind; set it to 'checksum'"
        )
    explicit = config.model_dump(mode="json", exclude_unset=True)
    merged = {**explicit, **_OURS, "detection": {**explicit.get("detection", {}), **_OURS["detection"]}}
    with tempfile.TemporaryDirectory(prefix="resilience-") as folder:
        path = Path(folder) / "calibrate.json"
        path.write_text(json.dumps(merged), encoding="utf-8")
        options = ["--resilience", _CONFIG, str(path), _DIRECTORY, str(run_dir)]
        command = [sys.executable, "-m", "resilience.launch", *options, *rest]
        process = subprocess.Popen(command, stdout=sys.stderr if quiet else None)
        with _passed_on(process):
            return process.wait(), run_dir


def _taken(arguments: Sequence[str], option: str) -> tuple[str | None, list[str]]:
    """The last value of an option, and the arguments without it."""
    value, rest, words = None, [], iter(arguments)
    for word in words:
        if word == option:
            value = next(words, None)
            if value is None:
                raise UsageError(f"{option}: needs a value")
        elif word.startswith(f"{option}="):
            value = word.partition("=")[2]
        else:
            rest.append(word)
    return value, rest


@contextlib.contextmanager
def _passed_on(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Pass SIGTERM on; Ctrl-C reaches the whole process group by itself, and the job decides when it ends."""

    def terminate(signum: int, frame: object) -> None:
        process.terminate()

    before = [(signal.SIGTERM, signal.signal(signal.SIGTERM, terminate))]
    before.append((signal.SIGINT, signal.signal(signal.SIGINT, signal.SIG_IGN)))
    try:
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)
        if process.poll() is None:
            process.kill()
            process.wait()
