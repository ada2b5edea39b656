"""Draws the reference pages from the code that they describe: the command's verbs, the settings, the protocol, metrics.

They are committed, so that they can be read without building anything; `--check` fails where they are out of date.
Never here: sentences about how things work; those stand in the code, beside what they speak of.
"""

from __future__ import annotations

import argparse
import enum
import inspect
import re
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pydantic
import typer

from resilience import metrics
from resilience.cli import examples
from resilience.cli.main import app
from resilience.config import Config

ROOT = Path(__file__).parents[1]
PROTO = ROOT / "proto" / "resilience" / "rpc" / "v1"
METRICS_MARK = "<!-- drawn by resilience.metrics.as_markdown() -->\n"
HEAD = "<!-- drawn by scripts/gen-docs from {source}; edit that -->\n"


def pages() -> dict[Path, str]:
    """Every page that is drawn, with its text."""
    docs = ROOT / "docs"
    by_hand, mark, _ = (docs / "metrics.md").read_text(encoding="utf-8").partition(METRICS_MARK)
    return {
        docs / "metrics.md": by_hand + mark + metrics.as_markdown(),
        docs / "reference" / "cli.md": command(),
        docs / "reference" / "configuration.md": configuration(),
        docs / "reference" / "protocol.md": protocol(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; 1 where a page is out of date")
    is_check = parser.parse_args().check
    stale = []
    for path, text in pages().items():
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            continue
        stale.append(str(path.relative_to(ROOT)))
        if not is_check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    if is_check and stale:
        print(f"scripts/gen-docs: out of date: {', '.join(stale)}; run scripts/gen-docs", file=sys.stderr)
    return int(is_check and bool(stale))


# ------ the command


def command() -> str:
    lines = [
        HEAD.format(source="resilience/cli"),
        "# Every verb and option",
        "",
        "How the command behaves, what its JSON holds and what its tables look like: [the command](../cli.md).",
        "",
    ]
    verbs = dict(_verbs(typer.main.get_command(app)))
    panels = dict.fromkeys(entry.panel for entry in examples.HELP.values())
    for panel in panels:
        lines += [f"## {panel}", ""]
        for name, verb in verbs.items():
            if name in examples.HELP and examples.HELP[name].panel == panel:
                lines += _verb(name, verb, examples.HELP[name])
    missing = verbs.keys() - examples.HELP.keys()
    assert not missing, f"verbs without help: {sorted(missing)}"
    return "\n".join(lines).rstrip() + "\n"


def _verbs(group: Any, before: str = "") -> Iterator[tuple[str, Any]]:
    for name, entry in group.commands.items():
        words = f"{before}{name}"
        if hasattr(entry, "commands"):
            yield from _verbs(entry, f"{words} ")
        elif not entry.hidden:
            yield words, entry


def _verb(name: str, verb: Any, help_: examples.Help) -> list[str]:
    arguments = [entry for entry in verb.params if entry.param_type_name == "argument"]
    options = [entry for entry in verb.params if entry.param_type_name == "option"]
    shown = [word if entry.required else f"[{word}]" for entry in arguments for word in [_word(entry)]]
    lines = [f"### `{' '.join(['resilience', name, *shown])}`", "", _text(inspect.cleandoc(verb.help or "")), ""]
    rows = [(f"`{_word(entry)}`", entry.help) for entry in arguments]
    for option in options:
        spelled = ", ".join(f"`{each}`" for each in (*option.opts, *option.secondary_opts))
        needs = " Required." if option.required else _default(option.default)
        rows.append((spelled, f"{option.help or ''}{needs}"))
    if rows:
        lines += ["| | |", "|---|---|", *(f"| {left} | {_cell(right or '')} |" for left, right in rows), ""]
    lines += ["```console"]
    for line, what in help_.examples:
        lines += [f"$ {line}", f"    # {what}"]
    return [*lines, "```", "", f"Exit codes: {help_.codes}.", ""]


def _word(argument: Any) -> str:
    return str(argument.metavar or argument.name).upper().strip("[]")


def _default(value: Any) -> str:
    if value is None or isinstance(value, bool) or value in ("", ()) or callable(value):
        return ""
    return f" Default: `{value}`."


# ------ the configuration


def configuration() -> str:
    lines = [
        HEAD.format(source="resilience/config.py"),
        "# Every setting",
        "",
        "Sources, strongest first: options of the launch; a file (`--resilience-config FILE`: TOML, YAML or JSON) or "
        'the block `"resilience"` of the DeepSpeed JSON; environment variables `RESILIENCE_<SECTION>__<KEY>`; the '
        "defaults. Unknown keys are refused with the nearest valid name. `resilience policy check FILE` explains one. "
        "[How to choose](../guides/settings.md) says which to change first.",
        "",
        "| setting | type | default | what it does |",
        "|---|---|---|---|",
    ]
    sections: list[str] = []
    for name, field in Config.model_fields.items():
        model = field.annotation
        if isinstance(model, type) and issubclass(model, pydantic.BaseModel):
            sections += _section(name, model)
        else:
            lines.append(_setting(name, field))
    return "\n".join([*lines, "", *sections]).rstrip() + "\n"


def _section(name: str, model: type[pydantic.BaseModel]) -> list[str]:
    rows = [_setting(key, field) for key, field in model.model_fields.items()]
    head = ["| setting | type | default | what it does |", "|---|---|---|---|"]
    return [f"## `[{name}]`", "", _text(inspect.cleandoc(model.__doc__ or "")), "", *head, *rows, ""]


def _setting(name: str, field: pydantic.fields.FieldInfo) -> str:
    bounds = [_bound(each) for each in field.metadata]
    kind = " ".join([_kind(field.annotation), *(each for each in bounds if each)])
    default = field.default
    shown = "unset" if default is None else f"`{_plain(default)}`"
    return f"| `{name}` | {_cell(kind)} | {shown} | {_cell(field.description or '')} |"


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str | Path):
        return f'"{value}"'
    if isinstance(value, float):
        return f"{value:g}"
    return "{}" if value == {} else str(value)


def _kind(annotation: Any) -> str:
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        bounds = [bound for each in parts[1:] for bound in _bounds(each)]
        return " ".join([_kind(parts[0]), *bounds])
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_kind(part) for part in parts if part is not type(None))
    if origin is typing.Literal:
        return " or ".join(f'`"{part}"`' for part in parts)
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return " or ".join(f'`"{member.value}"`' for member in annotation)
    names = {int: "integer", float: "number", bool: "true or false", str: "text", Path: "path"}
    return names.get(annotation, "table")


def _bounds(metadata: Any) -> list[str]:
    inner = getattr(metadata, "metadata", [metadata])
    return [text for text in (_bound(each) for each in inner) if text]


def _bound(constraint: Any) -> str:
    for name, sign in (("gt", ">"), ("ge", "≥"), ("lt", "<"), ("le", "≤")):
        value = getattr(constraint, name, None)
        if value is not None:
            return f"{sign} {value:g}"
    return ""


# ------ the protocol


def protocol() -> str:
    lines = [
        HEAD.format(source="proto/resilience/rpc/v1"),
        "# The protocol",
        "",
        "gRPC, package `resilience.rpc.v1`. The coordinator also serves the standard health service and reflection, so "
        "that `grpcurl` works without these files. Fields are only ever added. Nothing is pickled.",
        "",
    ]
    for path in sorted(PROTO.glob("*.proto")):
        lines += _proto(path)
    return "\n".join(lines).rstrip() + "\n"


_RPC = re.compile(r"rpc (\w+)\((stream )?([\w.]+)\) returns \((stream )?([\w.]+)\)")
_FIELD = re.compile(r"(?:(repeated|optional) )?(map<[^>]+>|[\w.]+) (\w+) = (\d+)(?: \[[^\]]*\])?;\s*(?://\s*(.*))?$")
_VALUE = re.compile(r"(\w+) = (\d+);\s*(?://\s*(.*))?$")


def _proto(path: Path) -> list[str]:
    """One file: its head, its services, messages and enumerations, each with the comments that stand at it."""
    head: list[str] = []
    tables: list[list[str]] = []  # in the order in which they begin
    open_: list[tuple[str, list[str]]] = []
    note: list[str] = []
    for number, raw in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        line = raw.strip()
        if line.startswith("//"):
            note.append(line.removeprefix("//").strip())
            continue
        what = " ".join(note)
        if line.startswith("syntax"):
            head = [what, ""]
        elif begun := re.match(r"(service|message|enum) (\w+) \{(\})?", line):
            kind, name, is_empty = begun.groups()
            tables.append([f"### {kind} `{name}`", "", *([what, ""] if what else [])])
            tables[-1] += ["No fields."] if is_empty else _COLUMNS[kind]
            if not is_empty:
                open_.append((kind, tables[-1]))
        elif one_of := re.match(r"oneof (\w+) \{", line):
            open_.append((f"one of `{one_of[1]}`", open_[-1][1]))
        elif line == "}":
            open_.pop()
        elif open_:
            kind, table = open_[-1]
            table.append(_row(line, what, kind if kind.startswith("one of") else "", f"{path.name}:{number}"))
        note = []
    return [f"## {path.name}", "", *head, *(line for table in tables for line in (*table, ""))]


_COLUMNS = {
    "service": ["| call | takes | gives | |", "|---|---|---|---|"],
    "message": ["| # | field | type | |", "|---|---|---|---|"],
    "enum": ["| # | value | |", "|---|---|---|"],
}


def _row(line: str, above: str, one_of: str, where: str) -> str:
    if call := _RPC.match(line):
        name, takes_many, takes, gives_many, gives = call.groups()
        takes, gives = (
            f"{'stream of ' if many else ''}`{kind}`" for many, kind in ((takes_many, takes), (gives_many, gives))
        )
        return f"| `{name}` | {takes} | {gives} | {_cell(above)} |"
    if field := _FIELD.match(line):
        many, kind, name, number, beside = field.groups()
        notes = [one_of, above, beside or ""]
        shown = f"{many} `{kind}`" if many else f"`{kind}`"
        return f"| {number} | `{name}` | {shown} | {_cell('; '.join(each for each in notes if each))} |"
    if value := _VALUE.match(line):
        name, number, beside = value.groups()
        return f"| {number} | `{name}` | {_cell(beside or above)} |"
    raise ValueError(f"{where}: {line!r} is not understood; teach scripts/gen_docs.py to read it")


# ------ text


def _text(text: str) -> str:
    """A docstring as Markdown: angle brackets would be taken for HTML."""
    return re.sub(r"<(?=\w)", r"\\<", text)


def _cell(text: str) -> str:
    return " ".join(_text(text).replace("|", "\\|").split())


if __name__ == "__main__":
    sys.exit(main())
