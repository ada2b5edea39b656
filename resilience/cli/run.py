"""status · ranks · events · drain"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from resilience.cli import output
from resilience.cli.options import Address, Json, RunDir, TokenFile, source

if TYPE_CHECKING:
    from resilience.rpc.v1 import operator_pb2 as op

__all__ = ["print_event", "register"]

_STYLES = {
    "detection": "yellow",
    "decision": "bold",
    "exit": "red",
    "strike": "magenta",
    "generation": "cyan",
    "checkpoint": "green",
    "finished": "bold",
}
"""Colours of events by their kind."""


def register(app: typer.Typer) -> None:
    """Add the verbs of this file."""
    app.command("status")(status)
    app.command("ranks")(ranks)
    app.command("events")(events)
    app.command("drain")(drain)


def status(
    address: Address = None, token_file: TokenFile = None, run_dir: RunDir = None, as_json: Json = False
) -> None:
    """The run at a glance."""
    run = source(address, token_file, run_dir).run()
    if as_json:
        output.print_json(run)
        return
    state = run.state if not run.HasField("exit_code") else f"{run.state} (exit code {run.exit_code})"
    deterministic = ("yes" if run.deterministic else "no") if run.HasField("deterministic") else "not measured yet"
    output.print_fields(
        [
            ("run", run.run_id),
            ("state", f"{state}, mode {run.mode}"),
            ("generation", f"{run.generation} of {run.world_size} ranks, {run.restarts_left} restarts left"),
            ("step", f"{run.step}, verified through {run.last_verified_step}"),
            ("loss", output.number(run.loss, 5) if run.HasField("loss") else None),
            ("speed", output.number(run.tokens_per_s, 4, "tokens/s") if run.HasField("tokens_per_s") else None),
            ("goodput", f"{run.goodput_ratio:.1%} of {output.duration(run.now - run.started_at)}"),
            ("deterministic", deterministic),
            ("faults", f"{run.num_detections} detections, {run.num_decisions} decisions"),
            ("last event", run.last_event),
        ]
    )


def ranks(address: Address = None, token_file: TokenFile = None, run_dir: RunDir = None, as_json: Json = False) -> None:
    """The ranks of the current generation: where they run and what they do."""
    found = source(address, token_file, run_dir).ranks().ranks
    if as_json:
        output.print_json(found)
        return
    output.print_table(
        [">rank", "node", "device", ">pid", "state", ">step", ">loss", ">age"],
        [
            (
                rank.rank,
                rank.node,
                rank.device,
                rank.pid,
                rank.state,
                rank.step,
                output.number(rank.loss, 4) if rank.HasField("loss") else "–",
                output.duration(rank.heartbeat_age_s),
            )
            for rank in found
        ],
        empty="no ranks yet",
    )


def events(
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with new events as they come.")] = False,
    after: Annotated[int, typer.Option(metavar="SEQUENCE", help="Only what came after this one.", min=0)] = 0,
    address: Address = None,
    token_file: TokenFile = None,
    run_dir: RunDir = None,
    as_json: Json = False,
) -> None:
    """The run's story, one line each. JSON is one object to a line."""
    for event in source(address, token_file, run_dir).events(after=after, follow=follow):
        print_event(event, as_json=as_json)


def print_event(event: op.Event, *, as_json: bool) -> None:
    """An event on a line of its own, at once."""
    if as_json:
        print(json.dumps(output.plain(event), ensure_ascii=False), flush=True)
    else:
        line = f"{output.clock_time(event.at)}  {event.kind:<10}  {event.text}"
        output.print_line(line, _STYLES.get(event.kind, ""))


def drain(
    reason: Annotated[str, typer.Option(help="Why, for the record.")] = "asked for on the command line",
    address: Address = None,
    token_file: TokenFile = None,
    run_dir: RunDir = None,
    as_json: Json = False,
) -> None:
    """Let the run write its next checkpoint, then end it with 75 (requeue)."""
    source(address, token_file, run_dir).drain(reason)
    if as_json:
        output.print_json({"draining": True, "reason": reason})
    else:
        output.print_text("draining: the run ends with 75 after its next checkpoint")
