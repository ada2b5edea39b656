"""One line that stays at the bottom of a terminal while others write above it.

The ranks' output goes to the same terminal without passing through here, so the line lies outside of the region that
scrolls (DECSTBM, which every terminal emulator knows), as that of package managers does; rich's Live redraws by going
up and would tear foreign lines apart.
"""

from __future__ import annotations

import os
from typing import TextIO

__all__ = ["Footer"]

_SAVE, _RESTORE = "\x1b7", "\x1b8"
_CLEAR_LINE = "\x1b[2K"
_ALL_SCROLLS = "\x1b[r"


class Footer:
    """The bottom line of `stream`'s terminal."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._size: os.terminal_size | None = None

    def show(self, line: str) -> None:
        """Put `line` there, cut to the terminal's width. One write, so that others cannot come between."""
        size = self._terminal_size()
        if size is None or size.lines < 3:
            return
        parts = []
        if size != self._size:
            # A new line first, so that what stands on the last line is not written over.
            parts.append(f"\n{_SAVE}\x1b[1;{size.lines - 1}r{_RESTORE}\x1b[1A")
            self._size = size
        parts.append(f"{_SAVE}\x1b[{size.lines};1H{_CLEAR_LINE}{line[: size.columns - 1]}{_RESTORE}")
        self._write("".join(parts))

    def close(self) -> None:
        """Give the line back."""
        if self._size is not None:
            self._write(f"{_SAVE}{_ALL_SCROLLS}\x1b[{self._size.lines};1H{_CLEAR_LINE}{_RESTORE}")
            self._size = None

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()

    def _terminal_size(self) -> os.terminal_size | None:
        try:
            return os.get_terminal_size(self._stream.fileno())
        except (OSError, ValueError):
            return None
