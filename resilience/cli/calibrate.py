"""calibrate"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from resilience.cli import output
from resilience.cli.options import Json
from resilience.errors import ResilienceError

if TYPE_CHECKING:
    from resilience.abft.calibration import Histogram

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the verbs of this file."""
    app.command("calibrate")(calibrate)


def calibrate(
    arguments: Annotated[
        list[str], typer.Argument(metavar="-- [DEEPSPEED OPTIONS] train.py …", help="What would follow `deepspeed`.")
    ],
    profile: Annotated[
        Path | None,
        typer.Option("--output", metavar="FILE", help="Write factors on the thresholds, for detection.profile (TOML)."),
    ] = None,
    safety_factor: Annotated[
        float, typer.Option("--safety-factor", min=1.0, help="Threshold ÷ largest residual seen, in the profile.")
    ] = 2.0,
    as_json: Json = False,
) -> None:
    """Run a job with every check on and nothing acted on; show its residuals and the bound on false alarms."""
    from resilience.abft.calibration import read_histograms, write_profile
    from resilience.launch.calibrating import run_calibrating

    code, run_dir = run_calibrating(arguments, quiet=as_json)
    found = read_histograms(run_dir)
    rows = _rows(found, safety_factor)
    if as_json:
        output.print_json({"run_dir": str(run_dir), "exit_code": code, "safety_factor": safety_factor, "sites": rows})
    else:
        _print(rows)
    if code != 0:
        print(f"resilience: the job ended with {code}, so no profile is written", file=sys.stderr)
        raise typer.Exit(code)
    if not rows:
        raise ResilienceError(f"{run_dir}: no rank left a histogram; did the script train under `deepspeed`?")
    if profile is not None:
        write_profile(found, profile, safety_factor=safety_factor)


def _rows(found: Histogram, safety_factor: float) -> list[dict[str, object]]:
    from resilience.abft.calibration import false_positive_bound, scale_of

    return [
        {
            "site": site,
            "num_checks": one.num_checks,
            "median_ratio": one.quantile(0.5),
            "p999_ratio": one.quantile(0.999),
            "max_ratio": one.max_ratio,
            "num_exceeded": one.num_exceeded,
            "num_alarms": one.num_alarms,
            "false_positive_bound": false_positive_bound(one.num_alarms, one.num_checks),
            "scale": scale_of(one, safety_factor=safety_factor),
            "counts": one.counts,
        }
        for site, one in sorted(found.sites.items())
    ]


def _print(rows: list[dict[str, object]]) -> None:
    """Residual ÷ threshold by site; `>1` went to the second stage, `alarms` were findings, in 95 % bounds."""
    columns = ["site", ">checks", ">median", ">99.9 %", ">max", ">>1", ">alarms", ">bound", ">scale"]
    keys = ("median_ratio", "p999_ratio", "max_ratio")
    output.print_table(
        columns,
        [
            (
                row["site"],
                row["num_checks"],
                *(f"{row[key]:.2g}" for key in keys),
                row["num_exceeded"],
                row["num_alarms"],
                f"{row['false_positive_bound']:.1g}",
                f"{row['scale']:.2g}",
            )
            for row in rows
        ],
        empty="no residuals were recorded",
    )
    from resilience.abft.calibration import false_positive_bound

    checks = sum(int(str(row["num_checks"])) for row in rows)
    alarms = sum(int(str(row["num_alarms"])) for row in rows)
    if rows:
        bound = false_positive_bound(alarms, checks)
        output.print_text(f"{alarms} alarms in {checks} checks: below {bound:.2g} a check, with 95 % confidence")
