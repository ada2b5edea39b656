"""The options that all verbs share. Imports nothing that takes long: every verb's file begins here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from resilience.cli.complete import run_directories

if TYPE_CHECKING:
    from resilience.cli.source import Source

__all__ = ["Address", "Json", "RunDir", "TokenFile", "source"]

Json = Annotated[bool, typer.Option("--json", help="Print JSON, with the names of report.json.")]
Address = Annotated[
    str | None,
    typer.Option("--address", metavar="HOST:PORT", help="The coordinator", show_default="that of the run in --run-dir"),
]
TokenFile = Annotated[
    Path | None,
    typer.Option(
        "--token-file", metavar="FILE", help="File with the coordinator's token", show_default="that of the run"
    ),
]
RunDir = Annotated[
    Path | None,
    typer.Option(
        "--run-dir",
        metavar="DIR",
        help="The run",
        show_default="./resilience-runs/latest",
        autocompletion=run_directories,
    ),
]


def source(address: str | None, token_file: Path | None, run_dir: Path | None, *, quiet: bool = False) -> Source:
    """Who answers for the run that the options name; `quiet` does not say that it is a journal."""
    from resilience.cli.source import open_source

    return open_source(address, token_file, run_dir, quiet=quiet)
