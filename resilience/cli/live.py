"""top · watch: a run while it goes on, as a picture that is drawn again, or as lines that are added"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from resilience.cli import output
from resilience.cli.options import Address, Json, RunDir, TokenFile, source
from resilience.cli.run import print_event
from resilience.clock import SystemClock
from resilience.errors import CoordinatorUnreachableError, UsageError

if TYPE_CHECKING:
    from resilience.cli.frame import Glance
    from resilience.cli.look import Looker
    from resilience.cli.source import Source

__all__ = ["register"]

_FOOTER = "q quits"
_USUAL = (80, 24)
"""Columns and lines of a terminal that does not say how many it has."""
_PATIENCE_S = 30.0
"""How long a coordinator that was seen may be away: longer than it takes to start one again."""
_ASK_INTERVAL_S = 0.5
_TICK_S = 0.1
_ENDED_BY_SIGNAL = 143


def register(app: typer.Typer) -> None:
    """Add the verbs of this file."""
    app.command("top")(top)
    app.command("watch")(watch)


def top(
    interval_s: Annotated[
        float, typer.Option("--interval", "-i", metavar="SECONDS", min=0.2, max=3600, help="Ask so often.")
    ] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Print one picture and end; needs no terminal.")] = False,
    address: Address = None,
    token_file: TokenFile = None,
    run_dir: RunDir = None,
    as_json: Json = False,
) -> None:
    """The run as it goes: ranks with their steps, decisions with their reasons, events. q quits.

    The picture follows the size of the terminal. What fits least goes first: columns, then events, then decisions. Of
    many ranks the unusual ones are shown. Once the coordinator has ended the picture stays, with the run's end.
    """
    if not (once or as_json):
        _refuse_without_terminal()
    opened = source(address, token_file, run_dir)
    from resilience.cli.look import Looker

    looker = Looker(opened, lambda: source(address, token_file, run_dir, quiet=True), SystemClock())
    glance = looker.look()
    if as_json:
        output.print_json(glance)
    elif once:
        _print_once(glance)
    else:
        _show(looker, glance, interval_s)


def _refuse_without_terminal() -> None:
    if not sys.stdout.isatty() or output.console().is_dumb_terminal:
        raise UsageError("top draws on a terminal, and this is none: give --once for one picture, or use watch")


def _print_once(glance: Glance) -> None:
    from resilience.cli.frame import draw, full_height

    console = output.console()
    height = full_height(glance, console.width)
    console.print(draw(glance, console.width, height), height=height)


def _show(looker: Looker, glance: Glance, interval_s: float) -> None:
    from rich.console import ConsoleDimensions
    from rich.live import Live

    from resilience.cli.frame import draw
    from resilience.cli.keys import pressed
    from resilience.cli.look import Background

    console, background = output.console(), Background(looker, interval_s)
    with pressed() as keys, Live(console=console, screen=True, auto_refresh=False) as live:
        drawn: os.terminal_size | None = None
        while not keys.ended:
            # Of the terminal itself: an exported COLUMNS says how wide it was when the shell began.
            size = os.get_terminal_size(sys.stdout.fileno())
            new = background.new()
            glance = new or glance
            if new is not None or size != drawn:
                console.size = ConsoleDimensions(size.columns or _USUAL[0], size.lines or _USUAL[1])
                live.update(draw(glance, console.width, console.height, footer=_FOOTER), refresh=True)
                drawn = size
            if "q" in keys.next(_TICK_S).lower():
                background.stop()
                return
    raise typer.Exit(_ENDED_BY_SIGNAL)


def watch(
    lines: Annotated[
        int, typer.Option("--lines", "-n", metavar="N", min=0, help="Begin with the newest N events; 0 for all.")
    ] = 10,
    address: Address = None,
    token_file: TokenFile = None,
    run_dir: RunDir = None,
    as_json: Json = False,
) -> None:
    """Events line by line until the run ends; then ends as the run did, with its exit code.

    A coordinator that is started again is found again. JSON is one object to a line, as with `events`.
    """
    opened = source(address, token_file, run_dir)
    raise typer.Exit(_follow(opened, lambda: source(address, token_file, run_dir, quiet=True), lines, as_json))


def _follow(opened: Source, reopen: Callable[[], Source], lines: int, as_json: bool) -> int:
    """Print what is new until the run has ended; its exit code.

    Raises:
        CoordinatorUnreachableError: the coordinator has gone for long, and its journal does not tell the run's end.
    """
    from resilience.cli.look import ENDED

    clock, pause = SystemClock(), threading.Event()
    shown, patience_s = 0, _PATIENCE_S if opened.is_live else 0.0
    heard_at = clock.monotonic()
    opened.run()  # patience is for who has answered once
    while True:
        with contextlib.suppress(CoordinatorUnreachableError):
            run = opened.run()  # first: nothing follows the event with which a run ends
            new = list(opened.events(after=shown, follow=False))
            for event in new if shown else new[-lines:]:
                print_event(event, as_json=as_json)
                shown = event.sequence
            if run.state in ENDED:
                return run.exit_code
            if opened.is_live:
                heard_at = clock.monotonic()
        silent_s = clock.monotonic() - heard_at
        if silent_s >= patience_s:
            raise CoordinatorUnreachableError(_gone(shown))
        pause.wait(_ASK_INTERVAL_S)
        if silent_s > _ASK_INTERVAL_S or not opened.is_live:
            opened.close()
            with contextlib.suppress(CoordinatorUnreachableError):
                opened = reopen()


def _gone(sequence: int) -> str:
    return (
        f"the coordinator has gone, and its journal does not tell how the run ended; the last event was {sequence}: "
        "start it again (resilience coordinator serve), or the launch"
    )
