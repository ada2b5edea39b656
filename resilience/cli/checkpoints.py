"""checkpoints list · checkpoints verify; prune and convert are in `checkpoint_care`"""

from __future__ import annotations

import socket
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from resilience.cli import checkpoint_care, output
from resilience.cli.options import Address, Json, RunDir, TokenFile, source
from resilience.errors import CheckpointError, ExitCode

if TYPE_CHECKING:
    from resilience.checkpoint.verify import Inspection

__all__ = ["register"]

_group = typer.Typer(help="Checkpoints: what happened to them, and whether they can be trusted.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add the verbs of this file."""
    checkpoint_care.register(_group)
    app.add_typer(_group, name="checkpoints")


@_group.command("list")
def list_(
    directory: Annotated[
        Path | None, typer.Argument(metavar="DIR", help="A save_dir or a tag's directory", show_default="ask the run")
    ] = None,
    address: Address = None,
    token_file: TokenFile = None,
    run_dir: RunDir = None,
    as_json: Json = False,
) -> None:
    """What the run reported of its checkpoints; with DIR, what lies there (manifests only, files are not read)."""
    if directory is not None:
        found = _inspected(directory, read_files=False)
        if as_json:
            output.print_json(found)
        else:
            _print_inspections(found, files_were_read=False)
        return
    facts = source(address, token_file, run_dir).checkpoints().checkpoints
    if as_json:
        output.print_json(facts)
        return
    from resilience.rpc.codec import from_proto

    output.print_table(
        ["time", "what", "tag", ">step", ">verified", ">took", "reason"],
        [
            (
                output.clock_time(fact.at),
                str(fact.kind),
                fact.tag,
                fact.step,
                fact.last_verified_step,
                output.duration(fact.seconds),
                fact.reason,
            )
            for fact in map(from_proto, facts)
        ],
        empty="no checkpoint was saved or loaded",
    )


@_group.command()
def verify(
    directory: Annotated[
        Path | None,
        typer.Argument(metavar="DIR", help="A save_dir or a tag's directory", show_default="those of the run"),
    ] = None,
    address: Address = None,
    token_file: TokenFile = None,
    run_dir: RunDir = None,
    as_json: Json = False,
) -> None:
    """Hold every file against its manifest. Ends with 1 if a checkpoint is not good."""
    if directory is not None:
        directories = [directory]
    else:
        facts = source(address, token_file, run_dir).checkpoints().checkpoints
        directories = [Path(name) for name in dict.fromkeys(fact.directory for fact in facts)]
    found = [each for path in directories for each in _inspected(path, read_files=True)]
    if as_json:
        output.print_json(found)
    else:
        _print_inspections(found, files_were_read=True)
    if not all(each.good for each in found):
        raise typer.Exit(ExitCode.FAILED)


def _inspected(directory: Path, *, read_files: bool) -> list[Inspection]:
    from resilience.checkpoint.verify import inspect

    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such directory; give a save_dir or one of its tags")
    found = inspect(directory, read_files=read_files, node=socket.gethostname())
    if not found:
        raise CheckpointError(
            f"{directory}: no checkpoint there; give a save_dir of save_checkpoint, or one of its tags"
        )
    return found


def _print_inspections(found: list[Inspection], *, files_were_read: bool) -> None:
    columns = ["tag", "state", "latest", ">step", ">files", ">size", "saved"]
    rows: list[list[object]] = [
        [
            each.tag,
            each.state,
            "yes" if each.latest else "",
            each.step or "–",
            each.num_files,
            output.number(each.num_bytes / 1e6, 4, "MB"),
            output.clock_time(each.at),
        ]
        for each in found
    ]
    if files_were_read:
        columns.append("good")
        for row, each in zip(rows, found, strict=True):
            row.append("ok" if each.good else "fail")
    output.print_table(columns, rows, empty="no checkpoint was saved")
    for each in found:
        for problem in each.problems:
            output.print_text(f"{each.tag}: {problem}")
