"""report: a run as one page of pictures, or as the JSON that report.json would hold now."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from resilience.cli import output
from resilience.cli.complete import run_names
from resilience.cli.options import Address, Json, RunDir, TokenFile, source
from resilience.errors import UsageError

if TYPE_CHECKING:
    from resilience.report_page import Material

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the verb of this file."""
    app.command("report")(report)


def report(
    run: Annotated[
        str | None,
        typer.Argument(
            metavar="RUN",
            help="Directory of the run, or its name in ./resilience-runs",
            autocompletion=run_names,
            show_default=False,
        ),
    ] = None,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write the page here.", dir_okay=False)
    ] = None,
    address: Address = None,
    token_file: TokenFile = None,
    run_dir: RunDir = None,
    as_json: Json = False,
) -> None:
    """A run in pictures: one page that needs nothing else, for runs that go on, have ended or have crashed."""
    if html is None and not as_json:
        raise UsageError("nothing to write: give --html FILE for the page, or --json")
    if run is not None and run_dir is not None:
        raise UsageError(f"two runs are named, {run} and --run-dir {run_dir}: give one")
    from resilience.report_page import draw_page

    material = _material(run, run_dir, address, token_file)
    if html is not None:
        _write(draw_page(material), html)
    if as_json:
        output.print_json(material.report)
    elif html is not None:
        output.print_text(f"{html}: {html.stat().st_size / 1000:.0f} kB, open it in any browser")


def _material(run: str | None, run_dir: Path | None, address: str | None, token_file: Path | None) -> Material:
    from resilience.report_page import from_coordinator, from_directory

    directory = run_dir or _directory(run)
    return from_directory(directory) if address is None else from_coordinator(source(address, token_file, directory))


def _directory(run: str | None) -> Path:
    from resilience.cli.source import LATEST_RUN

    if run is None:
        return LATEST_RUN
    named = LATEST_RUN.parent / run
    return named if not Path(run).is_dir() and named.is_dir() else Path(run)


def _write(page: str, path: Path) -> None:
    """Write the page whole or not at all."""
    if path.exists() and not path.is_file():
        raise UsageError(f"--html {path}: is a device or a pipe, not a file; give the name of a file")
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(page, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise UsageError(f"--html {path}: cannot be written ({error.strerror}); does its folder exist?") from None
