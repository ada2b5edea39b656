"""The command `resilience`: its verbs, and one clear line with the right exit code for everything that goes wrong."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer
from typer.exceptions import Abort, TyperException

import resilience
from resilience.cli import (
    calibrate,
    checkpoints,
    coordinator,
    devices,
    diagnosis,
    examples,
    faults,
    live,
    policy,
    report,
    run,
    snapshots,
    weights,
)
from resilience.errors import ExitCode, ResilienceError

__all__ = ["app", "main"]

app = typer.Typer(
    name="resilience",
    help="Look at and steer runs of `deepspeed --resilience`.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for module in (
    run,
    live,
    report,
    faults,
    snapshots,
    checkpoints,
    devices,
    policy,
    coordinator,
    diagnosis,
    weights,
    calibrate,
):
    module.register(app)
examples.teach(app)


def _version(asked: bool) -> None:
    if asked:
        print(resilience.__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    del version


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb.

    Returns:
        The exit code: 0; 1 when something is not found or not good; 64 for a wrong command line; 69 when the
        coordinator does not answer; 130 after Ctrl-C.
    """
    try:
        code = app(args=arguments, prog_name="resilience", standalone_mode=False)
        sys.stdout.flush()
        return int(code or 0)
    except ResilienceError as error:
        return _complain(str(error), error.exit_code)
    except TyperException as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # it has printed the help already
            return int(ExitCode.USAGE)
        return _complain(" ".join(error.format_message().split()), ExitCode.USAGE)
    except Abort:
        return 130
    except BrokenPipeError:
        # Whoever read us has gone; Python would complain when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return int(ExitCode.FAILED)


def _complain(line: str, code: int) -> int:
    print(f"resilience: {line}", file=sys.stderr)
    return int(code)
