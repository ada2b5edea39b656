"""The coordinator's log: one line per event of the run, for people or as JSON. Heartbeats are no events.

What a line speaks of (decision, detection, rank, node, device) stands in fields of its own, under the names of
report.json. Written to standard error: who started the coordinator says where that goes.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
from collections.abc import Mapping
from typing import Literal, TextIO

from resilience.coordinator.machine.facts import Fact
from resilience.coordinator.machine.state import State, StoryLine

__all__ = ["Log", "silence_grpc"]

Format = Literal["text", "json"]
_WARNINGS = frozenset({"detection", "exit"})


def silence_grpc(form: Format) -> None:
    """Where each line is to be JSON, keep gRPC's library from writing its own, such as of callers without certificate.

    Must be called before gRPC is imported. Who wants those lines sets GRPC_VERBOSITY.
    """
    if form == "json":
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")


class Log:
    """Writes lines to `out`. A log that cannot be written any more ends nothing."""

    def __init__(self, out: TextIO, *, form: Format, run_id: str) -> None:
        self._out = out
        self._form = form
        self._run_id = run_id
        self._num_told = 0

    def go_on(self, state: State, *, after: int) -> None:
        """Write the lines of the story, but for the first ones, which an earlier process wrote."""
        self._num_told = after
        self._catch_up(state)

    def note(self, fact: Fact, at: float, state: State) -> None:
        """Write what the story says since."""
        del fact, at
        self._catch_up(state)

    def _catch_up(self, state: State) -> None:
        num_new = state.num_lines - self._num_told
        if num_new <= 0:
            return
        self._num_told = state.num_lines
        for line in state.story[-num_new:]:
            place = {"generation": line.generation} if line.generation else {}
            step = {"step": line.step} if line.step else {}
            self.say(line.at, line.kind, line.text, {**place, **step, **line.about}, level=_level(line))

    def say(self, at: float, event: str, message: str, about: Mapping[str, str | int], *, level: str = "info") -> None:
        """Write one line.

        Args:
            at: seconds since the Unix epoch.
            event: its kind, as in `resilience events`.
            message: one sentence.
            about: what else is known, by name.
            level: info, warning or error.
        """
        time = datetime.datetime.fromtimestamp(at, datetime.UTC).isoformat(timespec="milliseconds")
        time = time.replace("+00:00", "Z")
        if self._form == "json":
            fields = {"time": time, "level": level, "event": event, "run": self._run_id, **about, "message": message}
            text = json.dumps(fields, ensure_ascii=False)
        else:
            known = "".join(f" {name}={_word(value)}" for name, value in about.items())
            text = f"{time} {level.upper():7} {event}: {_one_line(message)} | run={self._run_id}{known}"
        with contextlib.suppress(OSError, ValueError):  # a full disk, a closed pipe
            self._out.write(text + "\n")
            self._out.flush()


def _level(line: StoryLine) -> str:
    if line.kind == "finished":
        return "error" if line.about.get("exit_code") else "info"
    return "warning" if line.kind in _WARNINGS or line.about.get("outcome") == "failed" else "info"


def _word(value: str | int) -> str:
    """As in logfmt: quoted where it would fall apart."""
    text = str(value)
    return text if text and not set(text) & set(' "=\n') else json.dumps(text, ensure_ascii=False)


def _one_line(text: str) -> str:
    return " ".join(text.split())
