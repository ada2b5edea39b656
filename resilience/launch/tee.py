"""Copies what ranks write to their log files to the console, unchanged, as DeepSpeed's own launcher shows it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

__all__ = ["Tee"]

_INTERVAL_S = 0.05
_CHUNK_BYTES = 1 << 16


class Tee:
    """One thread that follows a set of growing files until it is stopped; then it copies what is left, and ends."""

    def __init__(self, files: Sequence[tuple[Path, BinaryIO]]) -> None:
        """Follow each path and write what it gains to the stream beside it. Paths may appear later."""
        self._targets = list(files)
        self._positions = [0] * len(self._targets)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="tee", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Copy the rest and end. Call it when the writers have ended."""
        self._stopped.set()
        self._thread.join()

    def _follow(self) -> None:
        while not self._stopped.wait(_INTERVAL_S):
            self._copy()
        self._copy()

    def _copy(self) -> None:
        for index, (path, stream) in enumerate(self._targets):
            try:
                with path.open("rb") as file:
                    file.seek(self._positions[index])
                    while chunk := file.read(_CHUNK_BYTES):
                        stream.write(chunk)
                        self._positions[index] += len(chunk)
                stream.flush()
            except (FileNotFoundError, BrokenPipeError):
                continue  # not written to yet, or nobody reads the console any more
