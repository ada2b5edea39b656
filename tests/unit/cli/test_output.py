"""Messages as JSON, and tables that keep to their width."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest

from resilience.cli import output
from resilience.rpc.codec import to_proto
from resilience.rpc.v1 import operator_pb2 as op
from resilience.testing import detection


def test_messages_become_plain_data_with_every_field() -> None:
    run = output.plain(op.Run(run_id="r", step=3))
    assert run["run_id"] == "r"
    assert run["loss"] is None  # unset
    assert run["restarts_left"] == 0


def test_what_json_has_no_word_for_is_null() -> None:
    found = output.plain(to_proto(dataclasses.replace(detection(step=1), residual_ratio=math.inf)))
    assert found["residual_ratio"] is None
    assert found["check"] == "checksum"
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.0123, "12 ms"), (2.04, "2.0 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert output.duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (0.0, "0.00"), (1234567.0, "1.23e+06"), (63.21, "63.2"), (1505.2, "1,505"), (math.inf, "inf")],
)
def test_numbers(value: float | None, text: str) -> None:
    assert output.number(value) == text


def test_short_cells_are_never_broken(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    output.print_table(
        ["tag", "reason"], [("global_step12", "some words that take more than the room there is")], empty=""
    )
    out = capsys.readouterr().out
    assert "global_step12" in out
    assert max(len(line) for line in out.splitlines()) <= 40


def test_no_rows_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_table(["tag"], [], empty="nothing here")
    assert capsys.readouterr().out == "nothing here\n"
