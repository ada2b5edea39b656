"""snapshots · snapshot now · rewind"""

from __future__ import annotations

from typing import Annotated

import typer

from resilience.cli import output
from resilience.cli.options import Address, Json, RunDir, TokenFile, source
from resilience.errors import ResilienceError

__all__ = ["register"]

_group = typer.Typer(help="Memory snapshots, on order.", no_args_is_help=True)
_ASKED = "asked for on the command line"


def register(app: typer.Typer) -> None:
    """Add the verbs of this file."""
    app.command("snapshots")(snapshots)
    app.add_typer(_group, name="snapshot")
    app.command("rewind")(rewind)


def snapshots(
    address: Address = None, token_file: TokenFile = None, run_dir: RunDir = None, as_json: Json = False
) -> None:
    """Memory snapshots that guardians told of lately, newest first; older ones may be overwritten by now."""
    asked = source(address, token_file, run_dir)
    found = asked.snapshots().snapshots
    if as_json:
        output.print_json(found)
        return
    now = asked.run().now
    output.print_table(
        [">step", ">generation", "tier", ">MiB", ">clean through", ">age", ">blocked", ">losses", "whole"],
        [
            (
                one.step,
                one.generation,
                one.tier,
                f"{one.num_bytes / 2**20:.1f}",
                one.clean_through,
                output.duration(max(0.0, now - one.at)),
                output.duration(one.seconds),
                one.redundancy,
                "yes" if one.complete else "no",
            )
            for one in found
        ],
        empty="no memory snapshot was told of",
    )


@_group.command("now")
def now_(
    reason: Annotated[str, typer.Option(help="Why, for the record.")] = _ASKED,
    address: Address = None,
    token_file: TokenFile = None,
    run_dir: RunDir = None,
    as_json: Json = False,
) -> None:
    """Have all ranks take a memory snapshot at the end of their step; says whether they did, within a minute."""
    answer = source(address, token_file, run_dir).take_snapshot(reason)
    if as_json:
        output.print_json(answer)
    elif answer.answer == answer.TAKEN:
        output.print_text(f"taken: all ranks have a copy of their state after step {answer.step}")
    if answer.answer == answer.NOT_TAKEN:
        raise ResilienceError(f"no snapshot is taken: {answer.reason}")
    if answer.answer == answer.OPEN:
        raise ResilienceError(f"no answer yet: {answer.reason}; `resilience snapshots` will show it")


def rewind(
    step: Annotated[int | None, typer.Option(min=0, help="To this snapshot", show_default="newest clean")] = None,
    reason: Annotated[str, typer.Option(help="Why, for the record.")] = _ASKED,
    address: Address = None,
    token_file: TokenFile = None,
    run_dir: RunDir = None,
    as_json: Json = False,
) -> None:
    """Have all ranks go back to a memory snapshot at the next boundary, and take the steps since again."""
    source(address, token_file, run_dir).rewind(reason, step)
    if as_json:
        output.print_json({"asked": "rewind", "reason": reason, "step": step})
    else:
        output.print_text("asked for: a rewind at the next boundary; `resilience decisions` shows what came of it")
