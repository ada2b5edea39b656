"""Where a benchmark's result goes is looked at before the benchmark begins."""

from __future__ import annotations

import argparse
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def result_file() -> Callable[[str], Path]:
    found: Callable[[str], Path] = runpy.run_path(str(SCRIPTS / "result_file.py"))["result_file"]
    return found


def test_a_file_that_is_there_or_not_is_taken(tmp_path: Path, result_file: Callable[[str], Path]) -> None:
    fresh = tmp_path / "result.json"
    assert result_file(str(fresh)) == fresh
    fresh.write_text("{}")
    assert result_file(str(fresh)) == fresh
    assert fresh.read_text() == "{}"


def test_what_cannot_be_written_is_named_with_the_reason(
    tmp_path: Path, result_file: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=f"no folder {tmp_path}/missing; make it"):
        result_file(str(tmp_path / "missing" / "result.json"))
    with pytest.raises(argparse.ArgumentTypeError, match="is a folder; name a file"):
        result_file(str(tmp_path))
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(argparse.ArgumentTypeError, match="may not be written"):
        result_file(str(tmp_path / "result.json"))
