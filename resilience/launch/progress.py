"""What a person sees of a run while it goes on, and the table at its end.

A thread of the launcher asks the coordinator's Operator service; ranks are never asked. On a terminal one line stays at
the bottom and events scroll by above it; elsewhere events come one to a line, with a line of progress now and then. All
of it goes to standard error. A coordinator that is silent is waited for without a word: the launcher speaks of that.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO

import grpc
import rich.box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from resilience.clock import Clock, SystemClock
from resilience.context import RunContext
from resilience.errors import ResilienceError
from resilience.launch.client import credentials
from resilience.launch.footer import Footer
from resilience.launch.outcome import Row, join
from resilience.rpc.codec import GRPC_OPTIONS
from resilience.rpc.tls import Tls, open_channel
from resilience.rpc.v1 import operator_pb2 as op
from resilience.rpc.v1 import operator_pb2_grpc as rpc

__all__ = ["Handle", "event_line", "progress_line", "start", "summary"]

_ASK_INTERVAL_S = 0.5
_PLAIN_INTERVAL_S = 5.0
_CALL_S = 2.0
_SUMMARY_COLUMNS = 100


class Handle:
    """Progress that is being shown."""

    def __init__(self, watcher: _Watcher | None) -> None:
        self._watcher = watcher

    def stop(self) -> None:
        """Show what is still unseen, give the terminal back, and end. Does nothing the second time."""
        if self._watcher is not None:
            self._watcher.stop()
            self._watcher = None


def start(context: RunContext, *, stream: TextIO | None = None, clock: Clock | None = None) -> Handle:
    """Show a run's progress until the handle is stopped. Never raises, never waits for the coordinator.

    Args:
        context: the run; `launch.live` says whether the line at the bottom is wanted: `auto` on a terminal only,
            `always`, or `never`, which shows nothing at all.
        stream: where to; standard error by default.
        clock: for the intervals.
    """
    live = context.config.launch.live
    out = stream or sys.stderr
    if live == "never":
        return Handle(None)
    footer = Footer(out) if live == "always" or out.isatty() else None
    watcher = _Watcher(context, out, footer, clock or SystemClock())
    watcher.thread.start()
    return Handle(watcher)


class _Watcher:
    """Asks and prints, on a thread of its own."""

    def __init__(self, context: RunContext, out: TextIO, footer: Footer | None, clock: Clock) -> None:
        self._context = context
        self._out = out
        self._footer = footer
        self._clock = clock
        self._stopped = threading.Event()
        self._sequence = 0
        self._shown_step = -1
        self._shown_at = clock.monotonic()
        self.thread = threading.Thread(target=self._watch, name="progress", daemon=True)

    def stop(self) -> None:
        self._stopped.set()
        self.thread.join(timeout=2 * _CALL_S)

    def _watch(self) -> None:
        tls = Tls.of(self._context.config.coordinator)
        channel = open_channel(self._context.coordinator_address, tls, GRPC_OPTIONS)
        stub, metadata = rpc.OperatorStub(channel), credentials(self._context.token_file)
        try:
            while not self._stopped.wait(_ASK_INTERVAL_S):
                self._look(stub, metadata)
            self._look(stub, metadata)  # the last events came after the last look
        finally:
            channel.close()
            if self._footer is not None:
                self._footer.close()

    def _look(self, stub: rpc.OperatorStub, metadata: tuple[tuple[str, str], ...]) -> None:
        request = op.StreamEventsRequest(after_sequence=self._sequence, follow=False)
        try:
            for event in stub.StreamEvents(request, metadata=metadata, timeout=_CALL_S):
                self._sequence = event.sequence
                self._print(event_line(event))
            run = stub.GetRun(op.GetRunRequest(), metadata=metadata, timeout=_CALL_S)
        except grpc.RpcError:
            return  # it is away, or being started again; what is unseen is asked for the next time
        self._show(run)

    def _show(self, run: op.Run) -> None:
        if self._footer is not None:
            self._footer.show(progress_line(run, with_event=True))
            return
        now = self._clock.monotonic()
        if run.step != self._shown_step and run.step > 0 and now - self._shown_at >= _PLAIN_INTERVAL_S:
            self._shown_step, self._shown_at = run.step, now
            self._print(progress_line(run))

    def _print(self, line: str) -> None:
        self._out.write(f"resilience: {line}\n")
        self._out.flush()


def event_line(event: op.Event) -> str:
    """An event, as one line."""
    return f"{event.kind}: {event.text}"


def progress_line(run: op.Run, *, with_event: bool = False) -> str:
    """The run at a glance, as one line."""
    parts = [f"step {run.step}"]
    if run.HasField("loss"):
        parts.append(f"loss {run.loss:.4f}")
    if run.HasField("tokens_per_s"):
        parts.append(f"{run.tokens_per_s:,.0f} tokens/s")
    parts += [f"generation {run.generation}", f"goodput {run.goodput_ratio:.0%}", run.state]
    if with_event and run.last_event:
        parts.append(run.last_event)
    return " · ".join(parts)


def summary(run_dir: Path, *, stream: TextIO | None = None) -> None:
    """Print what became of each fault and how the run ended, from its report.json.

    Raises:
        ResilienceError: there is no report, or it cannot be read.
    """
    path = run_dir / "report.json"
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ResilienceError(f"{path}: the run left no report ({error.strerror}); see {run_dir / 'logs'}") from None
    except ValueError:
        raise ResilienceError(f"{path}: is torn; the journal beside it is whole, see `resilience events`") from None
    out = stream or sys.stderr
    width = None if out.isatty() else _SUMMARY_COLUMNS
    console = Console(file=out, width=width, highlight=False)
    rows = join(report)
    if rows:
        console.print(_table(rows))
    for line in _ending(report, rows):
        console.print(line)


def _table(rows: Iterable[Row]) -> Table:
    table = Table(
        box=rich.box.HORIZONTALS, padding=(0, 1), collapse_padding=True, pad_edge=False, show_lines=True, expand=True
    )
    table.add_column("fault", max_width=20, overflow="fold")
    table.add_column("detected by", max_width=20, overflow="fold")
    table.add_column("decision and its reason", ratio=1, overflow="fold")
    table.add_column("outcome", overflow="fold")
    table.add_column("latency", justify="right", no_wrap=True)
    table.add_column("work\nlost", justify="right", no_wrap=True)
    for row in rows:
        decision = Text(row.decision, style="bold") + Text(f": {row.reason}" if row.reason else "", style="not bold")
        table.add_row(
            Text(_broken(row.fault) or "– (not injected)"),
            Text("NOT DETECTED", style="bold red") if row.undetected else Text(_broken(row.detected_by) or "–"),
            decision if row.decision else Text("–"),
            _outcome(row),
            Text("–" if row.latency_ms is None else _duration(row.latency_ms / 1000)),
            Text(_duration(row.lost_s) if row.decision else "–"),
        )
    return table


def _broken(place: str) -> str:
    """A fault or detection on lines of their own: when and where, what, in which operation."""
    return place.replace(": ", "\n", 1).replace(" in ", " in\n", 1)


def _outcome(row: Row) -> Text:
    good = row.outcome in ("succeeded", "")
    words = "\n".join(word for word in (row.outcome, row.verdict) if word and word != "pending")
    return Text(words or row.outcome or "–", style="green" if good and words else "" if good else "yellow")


def _ending(report: dict[str, Any], rows: list[Row]) -> list[Text]:
    undetected = sum(row.undetected for row in rows)
    code = "none" if report["exit_code"] is None else str(report["exit_code"])
    lost = {cause: seconds for cause, seconds in report["badput_s"].items() if seconds >= 0.05}
    causes = ", ".join(f"{cause} {_duration(seconds)}" for cause, seconds in sorted(lost.items(), key=lambda i: -i[1]))
    lines = [
        Text(
            f"run {report['run_id']}: {report['outcome']}, exit code {code}, {report['num_steps']} steps in "
            f"{report['num_generations']} generation{'s' if report['num_generations'] != 1 else ''}"
        ),
        Text(f"goodput {report['goodput_ratio']:.1%}" + (f"; the rest: {causes}" if causes else "")),
    ]
    if report.get("reason") and report["exit_code"] != 0:
        lines.insert(1, Text(f"because {report['reason']}"))
    if undetected:
        what = "injected fault was" if undetected == 1 else "injected faults were"
        lines.append(Text(f"{undetected} {what} not detected", style="bold red"))
    return lines


def _duration(seconds: float) -> str:
    if seconds < 0.01:
        return f"{seconds * 1000:.1f} ms" if seconds else "0"
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"
