"""doctor"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from resilience.cli import output
from resilience.cli.options import Address, Json, RunDir, TokenFile
from resilience.errors import CoordinatorUnreachableError, ExitCode, UsageError

if TYPE_CHECKING:
    from resilience.diagnosis import Finding

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the verbs of this file."""
    app.command("doctor")(doctor)


def doctor(
    address: Address = None, token_file: TokenFile = None, run_dir: RunDir = None, as_json: Json = False
) -> None:
    """Look at this machine: what a run needs, one line each, and the fix where something is wrong (then 1).

    Software: Python, torch and DeepSpeed, every requirement's version, the start hook, compilers and what they built.
    Machine: shared and locked memory, huge pages, ports, folders and who may write there, the clock, GPUs with their
    driver and ECC. Where there is a coordinator also the way to it: its answer, its clock, who can read its token.
    """
    from resilience.diagnosis import Level, diagnose

    way = _way(address, token_file, run_dir)
    findings = [*diagnose(), *way]
    if as_json:
        output.print_json(findings)
    else:
        rows = [
            (finding.level, finding.name, finding.detail + (f"\n→ {finding.fix}" if finding.fix else ""))
            for finding in findings
        ]
        output.print_table(["", "what", "found"], rows, empty="")
    if any(finding.level is Level.FAIL for finding in findings):
        raise typer.Exit(ExitCode.FAILED)


def _way(address: str | None, token_file: Path | None, run_dir: Path | None) -> list[Finding]:
    """The way to the coordinator that is named; else to that of the latest run, if there is one that goes on.

    Raises:
        CoordinatorUnreachableError: the one that is named does not answer.
    """
    from resilience.cli.source import LATEST_RUN, Endpoint, LiveSource, read_endpoint
    from resilience.clock import SystemClock
    from resilience.diagnosis import way

    endpoint = read_endpoint(run_dir or LATEST_RUN)
    if address is not None and (endpoint is None or endpoint.address != address):
        endpoint = Endpoint(address=address, run_id="", token_file=token_file)
    elif endpoint is None and run_dir is not None:
        raise UsageError(f"{run_dir}: no run there (no coordinator.json); give --run-dir DIR or --address HOST:PORT")
    if endpoint is None:
        return []
    endpoint = dataclasses.replace(endpoint, token_file=token_file or endpoint.token_file)
    live = LiveSource(endpoint.address, endpoint.token_file, endpoint.tls)
    try:
        live.run()  # the connection is made here, and is no part of the measurement
        return list(way.looks(lambda: live.run().now, endpoint.address, endpoint.token_file, SystemClock()))
    except CoordinatorUnreachableError:
        if address is not None or run_dir is not None:
            raise
        return []
    finally:
        live.close()
