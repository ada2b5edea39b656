"""How answers are printed: tables for people at 80 columns, JSON for programs.

JSON keys are the names of report.json; enumerations are their lower-case words, what is unset is null, and so are
numbers that JSON has no word for (infinite residuals), as in the report. Colours appear on terminals only, and not
where NO_COLOR is set. rich and protobuf are imported by what needs them, so that other verbs start without them.
"""

from __future__ import annotations

import dataclasses
import datetime
import enum
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from resilience.events import Decision

if TYPE_CHECKING:
    from google.protobuf.message import Message
    from rich.console import Console
    from rich.text import Text

__all__ = [
    "clock_time",
    "console",
    "duration",
    "number",
    "plain",
    "print_fields",
    "print_json",
    "print_line",
    "print_table",
    "print_text",
    "style_of",
]

_AS_VALUES = frozenset({"Detection", "Decision", "Evidence", "Strike", "RankExit", "CheckpointFact"})
"""Messages that mirror a value of `resilience.events`, whose names the report has."""
_NEVER_BROKEN = 16
"""Columns of cells up to this many characters stay whole; the wider ones share what room is left."""
_FIRST_WORD = frozenset({"state", "outcome"})
"""Fields that are coloured by their first word; more stands behind it."""
_STYLES = {
    "failed": "red",
    "persistent": "red",
    "refused": "red",
    "lost": "red",
    "stop": "red",
    "quarantine": "red",
    "cordoned": "red",
    "fail": "red",
    "warn": "yellow",
    "restart": "yellow",
    "restarting": "yellow",
    "restore": "yellow",
    "rewind": "yellow",
    "replay": "yellow",
    "draining": "yellow",
    "starting": "yellow",
    "deciding": "yellow",
    "replaying": "yellow",
    "rewinding": "yellow",
    "fast_forwarding": "yellow",
    "waiting": "yellow",
    "ended": "yellow",
    "shadowed": "yellow",
    "corrected": "green",
    "succeeded": "green",
    "published": "green",
    "training": "green",
    "done": "green",
    "finished": "green",
    "ok": "green",
}


def plain(value: Any) -> Any:
    """`value` as what JSON can hold: messages and dataclasses become objects with all their fields."""
    if hasattr(value, "DESCRIPTOR"):
        return _plain_message(value)
    if isinstance(value, Decision):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return plain({**fields, "verdicts": dict(value.verdicts)})
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, str | bool | int | float) or value is None:
        return str(value) if isinstance(value, enum.StrEnum) else value
    if isinstance(value, Iterable):
        return [plain(each) for each in value]
    return str(value)


def print_json(value: Any) -> None:
    """Print `value` as JSON on standard output."""
    print(json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[Any]], *, empty: str) -> None:
    """Print rows under their headings; `empty` where there are none.

    Columns whose heading begins with `>` are aligned to the right.
    """
    import rich.box
    from rich.table import Table

    shown = [[_cell(each) for each in row] for row in rows]
    if not shown:
        print_text(empty)
        return
    widths = _widths(columns, shown)
    out = console()
    fits = sum(widths) + 2 * len(widths) <= out.width
    table = Table(box=rich.box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False, header_style="bold")
    for heading, width in zip(columns, widths, strict=True):
        table.add_column(
            heading.removeprefix(">"),
            justify="right" if heading.startswith(">") else "left",
            overflow="fold",
            no_wrap=fits or width <= _NEVER_BROKEN,
        )
    for row in shown:
        table.add_row(*row)
    out.print(table)


def print_fields(fields: Iterable[tuple[str, Any]]) -> None:
    """Print names with their values, one to a line; those without a value are left out."""
    from rich.table import Table

    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold")
    grid.add_column(overflow="fold")
    for name, value in fields:
        if value is not None and value != "":
            text = _cell(value)
            if name in _FIRST_WORD:
                first = text.plain.replace(",", " ").split()[0]
                text.stylize(style_of(first), 0, len(first))
            grid.add_row(name, text)
    console().print(grid)


def print_text(line: str) -> None:
    """Print one paragraph as it is."""
    from rich.text import Text

    console().print(Text(line))


def print_line(line: str, style: str = "") -> None:
    """Print one line at once and whole, however narrow the terminal: it may go to a pipe that is read line by line."""
    if style and sys.stdout.isatty():
        from rich.text import Text

        console().print(Text(line, style=style), soft_wrap=True)
    else:
        print(line, flush=True)


def number(value: float | None, digits: int = 3, unit: str = "") -> str:
    """A number for people: as many significant digits as asked for, without an exponent where that is readable."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return str(value)
    magnitude = abs(value)
    if magnitude and (magnitude >= 1e6 or magnitude < 1e-3):
        text = f"{value:.{digits - 1}e}"
    else:
        whole = len(str(int(magnitude))) if magnitude >= 1 else 1
        text = f"{value:,.{max(digits - whole, 0)}f}"
    return f"{text} {unit}".rstrip()


def duration(seconds: float) -> str:
    """Seconds for people: 350 ms, 12.1 s, 3 min 20 s, 2 h 5 min."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def clock_time(at: float) -> str:
    """The local time of day of a moment; the date as well where it is not today. Empty for none."""
    if not at:
        return ""
    moment = datetime.datetime.fromtimestamp(at)
    today = moment.date() == datetime.datetime.now().date()
    return moment.strftime("%H:%M:%S" if today else "%Y-%m-%d %H:%M:%S")


def style_of(word: str) -> str:
    """The colour of a state, an action, an outcome or a level; empty for words that have none."""
    return _STYLES.get(word, "")


def console() -> Console:
    """Standard output, made anew for each print: it may have been redirected since."""
    from rich.console import Console

    return Console(file=sys.stdout, highlight=False, soft_wrap=False)


def _plain_message(message: Message) -> Any:
    if message.DESCRIPTOR.name in _AS_VALUES:
        from resilience.rpc.codec import from_proto

        value: Any = from_proto(message)  # type: ignore[call-overload]  # the names above are those it knows
        return plain(value)
    return {field.name: _field(message, field) for field in message.DESCRIPTOR.fields}


def _field(message: Message, field: Any) -> Any:
    content = getattr(message, field.name)
    if field.has_presence and not field.is_repeated and not message.HasField(field.name):
        return None
    if field.enum_type is not None:
        name = field.enum_type.values_by_number[content].name
        return name.lower()
    return plain(content)


def _widths(columns: Sequence[str], rows: Sequence[Sequence[Text]]) -> list[int]:
    """Characters that each column needs to stay whole."""
    cells = [[len(line) for row in rows for line in row[index].plain.split("\n")] for index in range(len(columns))]
    return [max(len(heading), *lengths) for heading, lengths in zip(columns, cells, strict=True)]


def _cell(value: Any) -> Text:
    from rich.text import Text

    text = "" if value is None else str(value)
    return Text(text, style=style_of(text))
