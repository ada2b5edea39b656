"""devices · cordon · uncordon"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from resilience.cli import output
from resilience.cli.complete import device_names
from resilience.cli.options import Address, Json, RunDir, TokenFile, source

__all__ = ["register"]

Target = Annotated[
    str, typer.Argument(metavar="DEVICE|NODE", help="As `resilience devices` shows it.", autocompletion=device_names)
]
Reason = Annotated[str, typer.Option(help="Why, for the record.")]


def register(app: typer.Typer) -> None:
    """Add the verbs of this file."""
    app.command("devices")(devices)
    app.command("cordon")(cordon)
    app.command("uncordon")(uncordon)


def devices(
    address: Address = None, token_file: TokenFile = None, run_dir: RunDir = None, as_json: Json = False
) -> None:
    """Devices with their faults over all jobs, and which are out of use."""
    found = source(address, token_file, run_dir).devices().devices
    if as_json:
        output.print_json(found)
        return
    output.print_table(
        ["node", "device", "use", ">transient", ">persistent", "last fault", "reason"],
        [
            (
                device.node,
                device.device,
                "cordoned" if device.cordoned else "in use",
                device.num_transient,
                device.num_persistent,
                output.clock_time(device.last_fault_at) or "–",
                device.reason,
            )
            for device in found
        ],
        empty="no devices known",
    )


def cordon(
    target: Target,
    reason: Reason = "cordoned on the command line",
    address: Address = None,
    token_file: TokenFile = None,
    run_dir: RunDir = None,
    as_json: Json = False,
) -> None:
    """Take a device or a node out of use for coming generations."""
    _set(target, True, reason, address, token_file, run_dir, as_json)


def uncordon(
    target: Target,
    reason: Reason = "put back on the command line",
    address: Address = None,
    token_file: TokenFile = None,
    run_dir: RunDir = None,
    as_json: Json = False,
) -> None:
    """Put a device or a node back into use."""
    _set(target, False, reason, address, token_file, run_dir, as_json)


def _set(
    target: str,
    cordoned: bool,
    reason: str,
    address: str | None,
    token_file: Path | None,
    run_dir: Path | None,
    as_json: bool,
) -> None:
    changed = list(source(address, token_file, run_dir).set_cordon(target, cordoned=cordoned, reason=reason).devices)
    if as_json:
        output.print_json({"cordoned": cordoned, "devices": changed})
        return
    state = "cordoned" if cordoned else "back in use"
    output.print_text(f"{state}: {', '.join(changed)}" if changed else f"{target} was {state} already")
