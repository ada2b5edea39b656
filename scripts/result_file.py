"""Where a benchmark's result goes: looked at before hours of work, not after them."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

__all__ = ["result_file"]


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
