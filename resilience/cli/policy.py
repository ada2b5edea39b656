"""policy show · policy check · policy simulate"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from resilience.cli import output
from resilience.cli.faults import decision_fields
from resilience.cli.options import Json
from resilience.clock import SystemClock
from resilience.errors import UsageError
from resilience.events import Check, Detection, DetectionKind, Evidence

if TYPE_CHECKING:
    from resilience.config import Config

__all__ = ["register"]

_group = typer.Typer(help="The table that decides: show it, check a configuration, try it out.", no_args_is_help=True)

ConfigFile = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="Limits and mode", show_default="the built-in ones")
]


def register(app: typer.Typer) -> None:
    """Add the verbs of this file."""
    app.add_typer(_group, name="policy")


@_group.command()
def show(
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the tables as Markdown.")] = False,
    as_json: Json = False,
) -> None:
    """The rows of the table, in the order in which they are tried; the first that applies wins."""
    from resilience import policy
    from resilience.policy.table import as_markdown

    if markdown:
        print(as_markdown(), end="")
        return
    tables = {"steps": policy.RULES, "exits": policy.EXIT_RULES}
    if as_json:
        output.print_json({name: [_row(rule) for rule in rules] for name, rules in tables.items()})
        return
    for title, rules in (("One attempt of one step", policy.RULES), ("A failure of processes", policy.EXIT_RULES)):
        output.print_text(title)
        rows = [(rule.name, str(rule.action), _code(rule), rule.text) for rule in rules]
        output.print_table(["rule", "action", ">exit", "when, and what is done"], rows, empty="")
        print()


def _row(rule: Any) -> dict[str, Any]:
    code = rule.exit_code
    return {
        "name": rule.name,
        "action": str(rule.action),
        "exit_code": None if code is None else int(code),
        "text": rule.text,
    }


def _code(rule: Any) -> str:
    return "" if rule.exit_code is None else str(int(rule.exit_code))


@_group.command()
def check(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A configuration: TOML, YAML or JSON.")],
    as_json: Json = False,
) -> None:
    """Validate a configuration, with the environment under it, and say what each setting means."""
    from resilience.config import load_config

    settings = list(_settings(load_config(file, environ=os.environ)))
    if as_json:
        output.print_json({name: {"value": value, "default": default} for name, value, default, _ in settings})
        return
    rows = [
        (name, value, "" if value == default else f"(default {default})", text)
        for name, value, default, text in settings
        if value != default or name.startswith(("mode", "policy."))
    ]
    output.print_table(["setting", ">value", "", "what it means"], rows, empty="")
    output.print_text(f"{file}: valid; what is not shown has its default")


def _settings(config: Config) -> Iterator[tuple[str, Any, Any, str]]:
    """(name, value, default, sentence) of every setting."""
    import pydantic

    from resilience.config import Config

    defaults = Config()
    for name, field in Config.model_fields.items():
        section, default = getattr(config, name), getattr(defaults, name)
        if not isinstance(section, pydantic.BaseModel):
            yield name, section, default, field.description or ""
            continue
        for key, inner in type(section).model_fields.items():
            yield f"{name}.{key}", getattr(section, key), getattr(default, key), inner.description or ""


@_group.command()
def simulate(
    file: Annotated[
        Path | None, typer.Argument(metavar="EVIDENCE", help="JSON with the fields of Evidence; or use the options.")
    ] = None,
    site: Annotated[str, typer.Option(help="Where the alarm was.")] = "linear.out",
    check: Annotated[Check, typer.Option(help="Which check raised it.")] = Check.CHECKSUM,
    kind: Annotated[DetectionKind, typer.Option(help="What it saw.")] = DetectionKind.MISMATCH,
    mended: Annotated[bool, typer.Option(help="It was mended in place.")] = False,
    attempt: Annotated[int, typer.Option(help="0 for the first execution, n for its n-th replay.", min=0)] = 0,
    cleared: Annotated[bool, typer.Option(help="The replay raised no alarm.")] = False,
    deterministic: Annotated[bool, typer.Option(help="The run was measured to be reproducible.")] = False,
    replay: Annotated[bool, typer.Option(help="The iteration can be replayed.")] = True,
    skips: Annotated[int, typer.Option(help="Steps skipped in a row before this one.", min=0)] = 0,
    restarts_left: Annotated[
        int | None, typer.Option(help="What is left of the budget", show_default="all", min=0)
    ] = None,
    config: ConfigFile = None,
    as_json: Json = False,
) -> None:
    """What would be decided about this evidence, by which row, and why nothing cheaper."""
    from resilience import policy
    from resilience.config import Config, load_config

    if file is not None:
        evidence = _read_evidence(file)
    else:
        alarm = _alarm(site, check, kind, mended, attempt)
        evidence = Evidence(
            run_id="simulated",
            generation=1,
            step=1,
            attempt=attempt,
            world_size=1,
            detections=() if cleared else (alarm,),
            previous=(alarm,) if attempt else (),
            deterministic=deterministic,
            replay_available=replay,
            replay_reason="" if replay else "as asked for",
            consecutive_skips=skips,
        )
    chosen = Config() if config is None else load_config(config, environ=os.environ)
    ruling = policy.judge(evidence, chosen.policy, chosen.mode, now=SystemClock().wall(), restarts_left=restarts_left)
    if as_json:
        rule = ruling.rule
        output.print_json(
            {"decision": ruling.decision, "rule": rule.name, "rule_text": rule.text, "considered": ruling.considered}
        )
        return
    fields = dict(decision_fields(ruling.decision))
    shown = [(name, fields[name]) for name in ("action", "reason", "exit code", "cordoned")]
    ruled_out = "\n".join(ruling.considered)
    output.print_fields([*shown, ("rule", f"{ruling.rule.name}: {ruling.rule.text}"), ("ruled out", ruled_out)])


def _alarm(site: str, check: Check, kind: DetectionKind, mended: bool, attempt: int) -> Detection:
    return Detection(
        detection_id="g1-r0-1",
        generation=1,
        step=1,
        micro_step=0,
        attempt=attempt,
        rank=0,
        node="node",
        device="device",
        site=site,
        layer=0,
        check=check,
        kind=kind,
        residual_ratio=float("inf") if kind is not DetectionKind.MISMATCH else 1e3,
        mended=mended,
    )


def _read_evidence(file: Path) -> Evidence:
    import pydantic

    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return pydantic.TypeAdapter(Evidence).validate_python(content)
    except OSError as error:
        raise UsageError(f"{file}: cannot be read ({error.strerror})") from None
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the whole"
        raise UsageError(f"{file}: {where}: {first['msg'][:1].lower()}{first['msg'][1:]}") from None
    except ValueError as error:
        raise UsageError(f"{file}: not JSON ({error})") from None
