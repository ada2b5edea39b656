"""coordinator serve"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["register"]

_group = typer.Typer(help="A coordinator of its own, apart from the launcher.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add the verbs of this file."""
    app.add_typer(_group, name="coordinator")


@_group.callback()
def _only_group() -> None:
    """Keeps `serve` a word of its own while it is the only verb."""


@_group.command("serve")
def serve_(
    run_id: Annotated[str, typer.Option("--run-id", metavar="NAME", help="The run; its launch sets launch.run_id.")],
    run_dir: Annotated[
        Path | None,
        typer.Option("--run-dir", metavar="DIR", help="Its directory", show_default="./resilience-runs/NAME"),
    ] = None,
    bind: Annotated[str | None, typer.Option(help="Address to listen on", show_default="coordinator.bind")] = None,
    port: Annotated[int | None, typer.Option(help="gRPC port", show_default="coordinator.port, or a free one")] = None,
    metrics_port: Annotated[
        int | None, typer.Option(help="Prometheus port", show_default="coordinator.metrics_port")
    ] = None,
    token_file: Annotated[
        Path | None, typer.Option("--token-file", metavar="FILE", help="The shared token, mode 0600.")
    ] = None,
    config: Annotated[Path | None, typer.Option("--config", metavar="FILE", help="TOML, YAML or JSON.")] = None,
) -> None:
    """Serve one run until SIGTERM; a run that was served before goes on from its journal."""
    from resilience.config import load_config
    from resilience.coordinator.log import silence_grpc
    from resilience.coordinator.paths import devices_path, journal_path

    sections = {
        "coordinator": {"bind": bind, "port": port, "metrics_port": metrics_port, "token_file": token_file},
        "launch": {"run_id": run_id, "dir": run_dir},
    }
    merged = load_config(config, overrides=sections, environ=os.environ)
    silence_grpc(merged.coordinator.log)
    from resilience.cli.source import LATEST_RUN
    from resilience.coordinator.access import dialled_host
    from resilience.coordinator.runtime import Settings, serve

    directory = merged.launch.dir or LATEST_RUN.parent / run_id
    settings = Settings(
        run_id=run_id,
        run_dir=directory.absolute(),
        bind=merged.coordinator.bind,
        dialled=dialled_host(merged.coordinator.bind),
        port=merged.coordinator.port or 0,
        metrics_bind=merged.coordinator.metrics_bind,
        metrics_port=merged.coordinator.metrics_port,
        metrics_port_may_move=merged.coordinator.metrics_port is None,
        token_file=None if merged.coordinator.token_file is None else merged.coordinator.token_file.absolute(),
        config=merged,
        journal=journal_path(os.environ, run_id),
        devices=devices_path(os.environ),
    )
    raise typer.Exit(serve(settings))
