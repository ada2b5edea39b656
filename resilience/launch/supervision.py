"""The runner's life from the start of the agents to the exit code: lease, coordinator, signals, leftovers."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import threading
from types import FrameType

from resilience.clock import SystemClock
from resilience.context import RunContext
from resilience.deepspeed.launcher import NodeCommand
from resilience.errors import ExitCode, ResilienceError
from resilience.launch import progress, shim
from resilience.launch.client import CoordinatorClient
from resilience.launch.embedded import EmbeddedCoordinator
from resilience.launch.lease import Lease
from resilience.launch.processes import adopt_orphans, end_descendants
from resilience.launch.run_directory import RunDirectory
from resilience.launch.shared_memory import remove_buffers
from resilience.snapshot.arena import remove_run

__all__ = ["Part", "run_exit_code", "supervise"]

_POLL_S = 0.1
_STOP_S = 20.0
"""From the first signal to SIGKILL for the agents; the whole run is given 30 s."""
_LINGER_S = 3.0
"""How long a coordinator stays for the agents of other runners, which ask it once more whether the run is over."""
_ASK_S = 2.0
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What this launcher is to the run."""

    leads: bool = True
    """Whether its word on how the run ended is final; not so for the runners of further nodes (`--no_ssh`)."""
    owns_directory: bool = True
    """Whether it made the run directory, and so holds its lease."""
    has_followers: bool = False
    """Whether other nodes' runners take part."""


def supervise(command: NodeCommand, context: RunContext, part: Part, *, coordinator: EmbeddedCoordinator | None) -> int:
    """Run the agents to their end; the run's exit code.

    Args:
        command: starts the agent of this node, or all agents through pdsh.
        context: the run.
        part: what this launcher is to the run.
        coordinator: the embedded one, where this launcher leads a run that has one.
    """
    adopt_orphans()
    signals = _Signals()
    lease = Lease(context.run_dir, lease_s=context.config.coordinator.lease_s) if part.owns_directory else None
    ending = _Ending(context, coordinator, lease)
    shown = progress.Handle(None)
    try:
        if lease is not None:
            lease.take()
        if coordinator is not None:
            coordinator.start()
        agents = _start(command)
        if coordinator is not None:
            coordinator.wait_until_ready()  # the agents are importing torch meanwhile
            print(
                f"resilience: run {context.run_id} in {context.run_dir}; coordinator {context.coordinator_address}, "
                f"metrics http://{coordinator.metrics_address}/metrics",
                file=sys.stderr,
            )
        if part.leads:
            shown = progress.start(context)
        remote = _Remote(context) if command.is_remote and part.leads else None
        code, reason = _watch(agents, coordinator, lease, signals, remote)
        if part.has_followers and signals.received is None:
            threading.Event().wait(_LINGER_S)
        if part.leads:
            ending.tell(code, reason)
    finally:
        shown.stop()
        ending.clean_up()
    if coordinator is not None:
        _summarise(context)
    if code != ExitCode.DONE:
        print(f"resilience: run {context.run_id} ends with {code}: {reason}", file=sys.stderr)
    return code


def _summarise(context: RunContext) -> None:
    """Show what became of each fault, from the report that the coordinator wrote when it ended."""
    try:
        progress.summary(context.run_dir)
    except ResilienceError as error:
        print(f"resilience: {error}", file=sys.stderr)


class _Signals:
    """Notes the first signal that asks for the end."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        for number in _SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number)


def _start(command: NodeCommand) -> subprocess.Popen[bytes]:
    """Start the agents. The one on this node gets SIGTERM when the runner dies; remote ones watch the lease."""
    argv = list(command.argv)
    if not command.is_remote:
        die_with_us = ("exec", str(os.getpid()), str(int(signal.SIGTERM)))
        argv = [sys.executable, "-I", "-S", shim.__file__, *die_with_us, *argv]
    return subprocess.Popen(argv, env=dict(command.environment))


def _watch(
    agents: subprocess.Popen[bytes],
    coordinator: EmbeddedCoordinator | None,
    lease: Lease | None,
    signals: _Signals,
    remote: _Remote | None,
) -> tuple[int, str]:
    """Wait for the end of the agents, or end them after a signal; the run's exit code and why."""
    clock = SystemClock()
    kill_at: float | None = None
    while agents.poll() is None:
        if signals.received is not None and kill_at is None:
            kill_at = clock.monotonic() + _STOP_S
            if lease is not None:
                lease.release()
            if remote is None:
                agents.terminate()  # pdsh would die of it at once, and nobody would wait for the agents' end
        if remote is not None and kill_at is None and remote.is_done():
            kill_at = clock.monotonic() + _STOP_S
        if kill_at is not None and clock.monotonic() > kill_at:
            agents.kill()
        if coordinator is not None:
            coordinator.supervise()
        threading.Event().wait(_POLL_S)
    if remote is not None and signals.received is None and remote.is_done(now=True):
        return ExitCode.DONE, "all ranks ended with 0"
    return run_exit_code(agents.returncode, signals.received)


class _Remote:
    """Whether the run is done, by the coordinator's word: a machine that is lost is one that pdsh fails for, or waits
    for, long after others have taken its place."""

    def __init__(self, context: RunContext) -> None:
        self._context = context
        self._clock = SystemClock()
        self._ask_at = 0.0
        self._is_done = False

    def is_done(self, *, now: bool = False) -> bool:
        """Whether all ranks ended with 0; asked every few seconds, or `now`."""
        at = self._clock.monotonic()
        if not self._is_done and (now or at >= self._ask_at):
            client = CoordinatorClient(self._context)
            self._is_done = client.known_exit_code() == ExitCode.DONE
            client.close()
            self._ask_at = self._clock.monotonic() + _ASK_S
        return self._is_done


def run_exit_code(agents_code: int, received: signal.Signals | None) -> tuple[int, str]:
    """What the runner ends with, and why, from how the agents ended. Never 0 unless they ended with 0."""
    if agents_code == ExitCode.DONE:
        return ExitCode.DONE, "all ranks ended with 0"
    if received is not None:
        return ExitCode.REQUEUE, f"{received.name} from outside"
    if agents_code in (ExitCode.USAGE, ExitCode.UNAVAILABLE, ExitCode.REQUEUE, ExitCode.DO_NOT_REQUEUE):
        return agents_code, f"the agent ended with {agents_code}; its own line above says why"
    how = f"was ended by signal {-agents_code}" if agents_code < 0 else f"ended with {agents_code}"
    return ExitCode.REQUEUE, f"the agent {how}"


class _Ending:
    """Leaves nothing behind, however the run ended."""

    def __init__(self, context: RunContext, coordinator: EmbeddedCoordinator | None, lease: Lease | None) -> None:
        self._context = context
        self._coordinator = coordinator
        self._lease = lease

    def tell(self, code: int, reason: str) -> None:
        """Tell the coordinator how the run ended: it may have lost the agent that would have."""
        client = CoordinatorClient(self._context)
        client.leave(generation=0, member="launcher", exit_code=code, reason=reason)
        client.close()

    def clean_up(self) -> None:
        """End every process of the run, the coordinator last, and remove what they left in shared memory."""
        coordinator_pid = None if self._coordinator is None else self._coordinator.pid
        end_descendants(spare=() if coordinator_pid is None else (coordinator_pid,))
        if self._lease is not None:
            self._lease.release()
        if self._coordinator is not None:
            self._coordinator.stop()
        end_descendants()
        endpoints = RunDirectory(self._context.run_dir).endpoints()
        remove_buffers([(endpoint.master_addr, endpoint.master_port) for endpoint in endpoints])
        remove_run(self._context.config.snapshot.dir, run_id=self._context.run_id, run_dir=self._context.run_dir)
