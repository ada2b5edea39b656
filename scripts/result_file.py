"""A benchmark's result: where it goes, looked at before hours of work and not after them, and of which code it is."""

from __future__ import annotations

import argparse
import os
import subprocess
from pathlib import Path

__all__ = ["result_file", "revision"]


def result_file(word: str) -> Path:
    """A type of argparse: a file that can be written, there already or not.

    Raises:
        argparse.ArgumentTypeError: it cannot.
    """
    path = Path(word)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{word} is a folder; name a file in it")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{word}: there is no folder {path.parent}; make it first")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{word}: may not be written; name another file")
    return path


def revision() -> str:
    """The commit that is measured, with a `+` where files differ from it; empty outside of a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--exclude=*", "--dirty=+"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
