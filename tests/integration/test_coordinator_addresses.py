"""What a coordinator leaves in its run directory: addresses that can be dialled, and the journal on a full disk too."""

from __future__ import annotations

import json
import socket
import subprocess
from pathlib import Path

import pytest

from resilience.config import Config
from resilience.coordinator.journal import open_recorded
from tests.integration.test_coordinator import TOKEN, Process

pytestmark = pytest.mark.integration


def test_what_listens_on_every_address_is_told_under_one_that_others_can_dial(tmp_path: Path) -> None:
    process = Process(tmp_path, token=TOKEN, config=Config.model_validate({"coordinator": {"bind": "0.0.0.0"}}))
    process.start()
    assert process.end() == 0
    assert json.loads((process.run_dir / "coordinator.json").read_text())["address"] == f"127.0.0.1:{process.port}"
    process.close_process()
    process.close_channel()


def test_a_report_that_cannot_be_written_is_one_line_and_the_journal_is_copied_all_the_same(tmp_path: Path) -> None:
    process = Process(tmp_path)
    (process.run_dir / "report.json").mkdir()  # a file cannot take its place, as on a full disk
    (process.run_dir / "coordinator.json").mkdir()
    process.start()
    process.join()
    assert process.end() == 1
    told = process.stderr()
    assert "coordinator.json cannot be written" in told
    assert told.splitlines()[-1].startswith(f"resilience: report {process.run_dir}/report.json cannot be written")
    assert "Traceback" not in told
    assert open_recorded(process.run_dir / "journal.db").machine.state.finished is not None
    assert not list(process.run_dir.glob(".*.json.*"))
    process.close_process()
    process.close_channel()


def test_a_metrics_port_that_another_run_was_quicker_to_take_is_left_to_it(tmp_path: Path) -> None:
    process = Process(tmp_path)
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = str(holder.getsockname()[1])
        process.process = subprocess.Popen(
            process.command("--metrics-port", port), env=process.environment(), stderr=subprocess.PIPE, text=True
        )
        assert process.process.stderr is not None
        assert "metrics http://127.0.0.1:" in process.process.stderr.readline()
        told = json.loads((process.run_dir / "coordinator.json").read_text())["metrics_address"]
        assert told != f"127.0.0.1:{port}"
        assert process.end() == 0
    process.close_process()
