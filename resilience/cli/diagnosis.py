"""doctor"""

from __future__ import annotations

import typer

from resilience.cli import output
from resilience.cli.options import Json
from resilience.errors import ExitCode

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the verbs of this file."""
    app.command("doctor")(doctor)


def doctor(as_json: Json = False) -> None:
    """Look at this machine: what a run needs, one line each, and the fix where something is wrong (then 1)."""
    from resilience.diagnosis import Level, diagnose

    findings = diagnose()
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
