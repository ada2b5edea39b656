"""What a person sees of a run: lines, the line at the bottom of a terminal, the table at the end."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import struct
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import pytest

from resilience.config import Config, LaunchConfig
from resilience.context import RunContext
from resilience.errors import ResilienceError
from resilience.launch import progress
from resilience.launch.footer import Footer
from resilience.rpc.v1 import operator_pb2 as op


def test_the_progress_line_holds_what_is_known() -> None:
    run = op.Run(step=12, generation=2, goodput_ratio=0.913, state="training", last_event="generation 2 begins")
    assert progress.progress_line(run) == "step 12 · generation 2 · goodput 91% · training"
    run.loss, run.tokens_per_s = 2.5, 12345.6
    assert progress.progress_line(run, with_event=True) == (
        "step 12 · loss 2.5000 · 12,346 tokens/s · generation 2 · goodput 91% · training · generation 2 begins"
    )


@pytest.fixture
def terminal() -> Iterator[tuple[TextIO, int]]:
    """A terminal of 10 lines and 30 columns: what writes to it, and where that comes out."""
    outside, inside = pty.openpty()
    fcntl.ioctl(inside, termios.TIOCSWINSZ, struct.pack("HHHH", 10, 30, 0, 0))
    with os.fdopen(inside, "w", encoding="utf-8") as stream:
        yield stream, outside
    os.close(outside)


def test_the_footer_keeps_to_the_last_line_and_gives_it_back(terminal: tuple[TextIO, int]) -> None:
    stream, outside = terminal
    footer = Footer(stream)
    footer.show("x" * 100)
    shown = os.read(outside, 4096).decode()
    assert "\x1b[1;9r" in shown  # all lines but the last scroll
    assert f"\x1b[10;1H\x1b[2K{'x' * 29}\x1b8" in shown
    footer.show("again")
    assert "\x1b[1;9r" not in os.read(outside, 4096).decode()
    footer.close()
    assert "\x1b[r" in os.read(outside, 4096).decode()


def test_the_footer_of_no_terminal_is_silent() -> None:
    stream = io.StringIO()
    footer = Footer(stream)
    footer.show("line")
    footer.close()
    assert stream.getvalue() == ""


def context(tmp_path: Path, live: Any) -> RunContext:
    return RunContext(
        run_id="r", run_dir=tmp_path, coordinator_address="127.0.0.1:9", config=Config(launch=LaunchConfig(live=live))
    )


@pytest.mark.parametrize("live", ["auto", "always", "never"])
def test_a_silent_coordinator_is_waited_for_without_a_word(tmp_path: Path, live: str) -> None:
    stream = io.StringIO()
    handle = progress.start(context(tmp_path, live), stream=stream)
    handle.stop()
    handle.stop()
    assert stream.getvalue() == ""


REPORT: dict[str, Any] = {
    "run_id": "r1",
    "outcome": "done",
    "exit_code": 0,
    "reason": "all ranks ended with 0",
    "num_steps": 80,
    "num_generations": 2,
    "goodput_ratio": 0.75,
    "badput_s": {"recovery": 12.0, "init": 20.5, "replay": 0.0},
    "faults_injected": [
        {
            "strike_id": "f0-n0",
            "step": 12,
            "micro_step": 1,
            "rank": 0,
            "site": "attention.scores",
            "layer": 1,
            "kind": "inf",
            "struck_at": 1.0,
            "attempt": 0,
            "no_effect": False,
            "relative_change": None,
        }
    ],
    "detections": [
        {
            "detection_id": "g1-r0-1",
            "step": 12,
            "micro_step": 1,
            "attempt": 0,
            "rank": 0,
            "layer": 1,
            "site": "attention.scores",
            "check": "checksum",
            "kind": "inf",
            "verdict": "transient",
        }
    ],
    "decisions": [
        {
            "decision_id": "g1-s12-a0",
            "step": 12,
            "action": "corrected",
            "reason": "it was mended in place",
            "evidence": ["g1-r0-1"],
            "verdicts": {},
            "outcome": "succeeded",
            "latency_ms": 1.25,
            "lost_s": 0.0,
        }
    ],
}


def summarised(tmp_path: Path, **change: Any) -> list[str]:
    (tmp_path / "report.json").write_text(json.dumps({**REPORT, **change}))
    stream = io.StringIO()
    progress.summary(tmp_path, stream=stream)
    return stream.getvalue().splitlines()


def test_the_summary_fits_100_columns_and_says_everything(tmp_path: Path) -> None:
    lines = summarised(tmp_path)
    text = "\n".join(lines)
    assert max(len(line) for line in lines) <= 100
    for said in ("step 12, rank 0", "attention.scores[1]", "corrected: it was mended", "succeeded", "1.2 ms"):
        assert said in text
    assert lines[-2] == "run r1: done, exit code 0, 80 steps in 2 generations"
    assert lines[-1] == "goodput 75.0%; the rest: init 20.5 s, recovery 12.0 s"


def test_the_summary_of_a_clean_run_has_no_table(tmp_path: Path) -> None:
    lines = summarised(tmp_path, faults_injected=[], detections=[], decisions=[], badput_s={})
    assert lines == ["run r1: done, exit code 0, 80 steps in 2 generations", "goodput 75.0%"]


def test_the_summary_counts_what_was_not_detected_and_says_why_a_run_failed(tmp_path: Path) -> None:
    lines = summarised(tmp_path, detections=[], decisions=[], exit_code=75, outcome="failed", reason="a device is bad")
    assert any("NOT DETECTED" in line for line in lines)
    assert "because a device is bad" in lines
    assert lines[-1] == "1 injected fault was not detected"


def test_a_missing_and_a_torn_report_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(ResilienceError, match="left no report"):
        progress.summary(tmp_path)
    (tmp_path / "report.json").write_text("{")
    with pytest.raises(ResilienceError, match="is torn"):
        progress.summary(tmp_path)
