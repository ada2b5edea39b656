"""`deepspeed --resilience …`: what DeepSpeed's runner does instead of starting its per-node launchers itself.

DeepSpeed parses, reads the hostfile and builds the command; this module prepares the run, starts our agents by that
command, supervises them, and cleans up. A launch without `--resilience` goes to DeepSpeed's own functions untouched.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from resilience.config import Config
from resilience.context import RunContext
from resilience.coordinator.journal import set_aside
from resilience.coordinator.paths import journal_path
from resilience.deepspeed.launcher import NodeCommand, parse_with_options, planned_command
from resilience.deepspeed.versions import require_tested_version
from resilience.errors import CoordinatorUnreachableError, ResilienceError, UsageError
from resilience.launch.client import is_reachable
from resilience.launch.embedded import EmbeddedCoordinator, choose_metrics_port, choose_port
from resilience.launch.follower import find_context
from resilience.launch.network import is_loopback, local_address_towards
from resilience.launch.options import Options, add_options, load, refuse_unsupported
from resilience.launch.run_directory import RunDirectory, default_directory
from resilience.launch.supervision import Part, supervise
from resilience.rpc.tls import Tls

__all__ = ["extend"]

_AGENT_MODULE = "resilience.launch.node"
_EXTERNAL_S = 5.0


def extend(runner: Any) -> None:
    """Replace `parse_args` and `main` of `deepspeed.launcher.runner` by ones that know our options."""
    stock_parse, stock_main = runner.parse_args, runner.main
    parse = parse_with_options(runner, add_options)

    def main(args: Sequence[str] | None = None) -> None:
        try:
            namespace = parse(args)
            options = Options.of(namespace)
            if options.resilience:
                sys.exit(_launch(runner, stock_main, args, namespace, options))
        except ResilienceError as error:
            print(f"resilience: {error}", file=sys.stderr)
            sys.exit(error.exit_code)
        runner.parse_args = stock_parse
        stock_main(args)

    runner.parse_args = parse
    runner.main = main


def _launch(
    runner: Any,
    stock_main: Callable[[Sequence[str] | None], None],
    args: Sequence[str] | None,
    namespace: argparse.Namespace,
    options: Options,
) -> int:
    """Prepare the run and supervise it to its end; the exit code."""
    refuse_unsupported(namespace)
    require_tested_version(importlib.metadata.version("deepspeed"))
    config = load(options, namespace.user_args, os.environ)
    command = planned_command(runner, stock_main, args)
    has_followers = namespace.no_ssh and len(command.world) > 1
    if has_followers and namespace.node_rank > 0:
        context, owns_directory = find_context(config, options)
        part = Part(leads=False, owns_directory=owns_directory)
        return supervise(_agent_command(command, context.run_dir / "context.json"), context, part, coordinator=None)
    return _lead(command, config, options, has_followers=has_followers)


def _lead(command: NodeCommand, config: Config, options: Options, *, has_followers: bool) -> int:
    """Launch as the one who owns the run: its directory, its lease, its coordinator."""
    _check_spares(config.launch.num_spare_nodes, len(command.world))
    run_id = config.launch.run_id or f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    config = _reachable(config, command.master_addr) if command.is_remote or has_followers else config
    is_external = config.coordinator.address is not None
    # What can be refused is refused before anything is written.
    port = 0 if is_external else choose_port(config.coordinator)
    metrics_port = 0 if is_external else choose_metrics_port(config.coordinator)
    if is_external and not is_reachable(
        str(config.coordinator.address), timeout_s=_EXTERNAL_S, tls=Tls.of(config.coordinator)
    ):
        raise CoordinatorUnreachableError(
            f"coordinator.address = {config.coordinator.address}: no answer within {_EXTERNAL_S:.0f} s; "
            "start it with `resilience coordinator serve`, or leave the address out for an embedded one"
        )
    directory = RunDirectory(config.launch.dir or default_directory(run_id))
    directory.make()
    if not is_external:
        set_aside(journal_path(os.environ, run_id))
    context = RunContext(
        run_id=run_id,
        run_dir=directory.path,
        coordinator_address=config.coordinator.address or f"{_dialled(config, command)}:{port}",
        token_file=config.coordinator.token_file if is_external else directory.create_token(),
        config=config,
        fault_plan=_absolute(options.faults),
    )
    context.write(directory.context)
    coordinator = None
    if is_external:
        directory.write_coordinator(
            address=context.coordinator_address, metrics_address=None, pid=None, context=context
        )
    else:
        coordinator = EmbeddedCoordinator(directory, context, metrics_port=metrics_port)
    part = Part(has_followers=has_followers)
    return supervise(_agent_command(command, directory.context), context, part, coordinator=coordinator)


def _check_spares(num_spare_nodes: int, num_nodes: int) -> None:
    """Refuse a launch in which every node would wait for another one to be lost.

    Raises:
        UsageError: none would be left to train.
    """
    if num_spare_nodes >= num_nodes:
        raise UsageError(
            f"launch.num_spare_nodes = {num_spare_nodes}: of {num_nodes} in all at least one node must train; "
            f"set it to {num_nodes - 1} at most, or launch on more nodes (--hostfile)"
        )


def _reachable(config: Config, master_addr: str) -> Config:
    """For nodes elsewhere: listen on the address that faces them, unless the configuration names one."""
    if config.coordinator.bind != Config().coordinator.bind or is_loopback(master_addr):
        return config
    try:
        bind = local_address_towards(master_addr)
    except OSError as error:
        raise UsageError(
            f"--master_addr {master_addr}: cannot be reached from here ({error.strerror}); "
            "check the name, or set coordinator.bind to this machine's address"
        ) from None
    return config.model_copy(update={"coordinator": config.coordinator.model_copy(update={"bind": bind})})


def _dialled(config: Config, command: NodeCommand) -> str:
    """The host under which agents find an embedded coordinator: what it binds to, unless that is every address."""
    bind = config.coordinator.bind
    return local_address_towards(command.master_addr) if bind in ("0.0.0.0", "::") else bind


def _agent_command(command: NodeCommand, context_path: Path) -> NodeCommand:
    path = str(context_path)
    # pdsh joins its words into one line for the shells of the nodes.
    return command.with_launcher(
        _AGENT_MODULE, "--resilience-context", shlex.quote(path) if command.is_remote else path
    )


def _absolute(path: Path | None) -> Path | None:
    return None if path is None else path.absolute()
