"""`--no_ssh --node_rank N` with N > 0: finds the run that node 0 leads, by its directory or an external coordinator."""

from __future__ import annotations

import threading
from pathlib import Path

from resilience.clock import SystemClock
from resilience.config import Config
from resilience.context import RunContext
from resilience.errors import CoordinatorUnreachableError, UsageError
from resilience.launch.client import is_reachable
from resilience.launch.lease import Holder
from resilience.launch.options import Options
from resilience.launch.run_directory import RunDirectory, default_directory
from resilience.rpc.tls import Tls

__all__ = ["find_context"]

_WAIT_S = 120.0
_POLL_S = 0.2


def find_context(config: Config, options: Options) -> tuple[RunContext, bool]:
    """The context of the run that this node belongs to; waits until node 0 has written it.

    Returns:
        The context, and whether its directory is this node's own (there is no shared one).

    Raises:
        UsageError: nothing says which run it is.
        CoordinatorUnreachableError: the run did not appear.
    """
    run_dir = _shared_directory(config)
    if run_dir is not None:
        return _wait_for_leader(run_dir), False
    address, run_id = config.coordinator.address, config.launch.run_id
    if address is None or run_id is None:
        raise UsageError(
            "--no_ssh --node_rank > 0: this node cannot tell which run it belongs to; give all nodes the same "
            "--resilience-dir on shared storage, or coordinator.address together with launch.run_id"
        )
    if not is_reachable(address, timeout_s=_WAIT_S, tls=Tls.of(config.coordinator)):
        raise CoordinatorUnreachableError(f"coordinator.address = {address}: no answer within {_WAIT_S:.0f} s")
    directory = RunDirectory(default_directory(run_id))
    directory.make()
    faults = options.faults
    context = RunContext(
        run_id=run_id,
        run_dir=directory.path,
        coordinator_address=address,
        token_file=config.coordinator.token_file,
        config=config,
        fault_plan=None if faults is None else faults.absolute(),
    )
    context.write(directory.context)
    return context, True


def _shared_directory(config: Config) -> Path | None:
    if config.launch.dir is not None:
        return config.launch.dir.absolute()
    if config.launch.run_id is not None and config.coordinator.address is None:
        return default_directory(config.launch.run_id)
    return None


def _wait_for_leader(run_dir: Path) -> RunContext:
    """Wait for a lease that is being renewed: what a dead run left in the same directory must not be joined."""
    directory = RunDirectory(run_dir)
    deadline = SystemClock().monotonic() + _WAIT_S
    first: Holder | None = None
    while SystemClock().monotonic() < deadline:
        holder = Holder.read(run_dir)
        if holder is not None and directory.coordinator.exists():
            if first is None or (holder.host, holder.pid) != (first.host, first.pid):
                first = holder
            elif holder.count > first.count:
                return RunContext.read(directory.context)
        threading.Event().wait(_POLL_S)
    raise CoordinatorUnreachableError(
        f"{run_dir}: node 0 has not started a run there within {_WAIT_S:.0f} s; "
        "start it with the same --resilience-dir on storage that all nodes share"
    )
