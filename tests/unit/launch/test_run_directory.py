"""The run directory: what is kept, what is refused, what is secret."""

from __future__ import annotations

import json
import os
import socket
import stat
from pathlib import Path

import pytest

from resilience.context import RunContext
from resilience.errors import UsageError
from resilience.launch.run_directory import Endpoint, RunDirectory


def context(directory: RunDirectory, run_id: str = "first") -> RunContext:
    made = RunContext(run_id=run_id, run_dir=directory.path, coordinator_address="127.0.0.1:1")
    made.write(directory.context)
    return made


def test_latest_names_the_newest_run(tmp_path: Path) -> None:
    for name in ("a", "b"):
        RunDirectory(tmp_path / name).make()
        assert os.readlink(tmp_path / "latest") == name


def test_token_is_secret_and_new_for_each_run(tmp_path: Path) -> None:
    first, second = RunDirectory(tmp_path / "a"), RunDirectory(tmp_path / "b")
    for directory in (first, second):
        directory.make()
        directory.create_token()
        assert stat.S_IMODE(directory.token.stat().st_mode) == 0o600
    assert first.token.read_text() != second.token.read_text()
    assert len(first.token.read_text()) >= 32


def test_an_earlier_run_is_kept_aside(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "run")
    for number in range(3):
        directory.make()
        assert not directory.context.exists()
        context(directory, "same-name")
        directory.create_token()
        directory.report.write_text(str(number))
    kept = sorted(path.read_text() for path in (tmp_path / "run" / "previous").glob("*/report.json"))
    assert kept == ["0", "1"]


def test_a_run_that_is_going_on_is_not_disturbed(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "run")
    directory.make()
    (tmp_path / "run" / "launcher.lease").write_text(
        json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "count": 3})
    )
    with pytest.raises(UsageError, match=f"pid {os.getpid()} .* is going on"):
        directory.make()


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"file/run: cannot be written"):
        RunDirectory(tmp_path / "file" / "run").make()


def test_endpoints_of_all_generations_are_found_again(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    directory.make()
    directory.write_endpoint(1, "a", Endpoint("127.0.0.1", 29601))
    directory.write_endpoint(2, "a", Endpoint("127.0.0.1", 40000))
    (directory.generation_logs(2) / "endpoint-b.json").write_text("")  # torn by a full disk
    assert [endpoint.master_port for endpoint in directory.endpoints()] == [29601, 40000]


def test_coordinator_json_names_the_token_file_not_the_token(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    directory.make()
    token = directory.create_token()
    made = context(directory).model_copy(update={"token_file": token})
    directory.write_coordinator(address="h:1", metrics_address="h:2", pid=7, context=made)
    content = json.loads(directory.coordinator.read_text())
    assert content == {
        "address": "h:1",
        "metrics_address": "h:2",
        "pid": 7,
        "token_file": str(token),
        "run_id": "first",
        "tls": None,
    }
    assert token.read_text() not in directory.coordinator.read_text()
