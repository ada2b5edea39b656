"""Entry point of the agent, `python -m resilience.launch.node --resilience-context PATH …`.

It stands in for `deepspeed.launcher.launch` on each node and takes the same arguments after its own. It ends with the
run's exit code.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from resilience.context import RunContext
from resilience.deepspeed.launcher import node_parser_arguments, pid_file, uses_gpu
from resilience.errors import CoordinatorUnreachableError, ExitCode, ResilienceError, UsageError
from resilience.launch import guardian as guardians
from resilience.launch.agent import Agent, Node, NodeState
from resilience.launch.client import CoordinatorClient, ReportStream
from resilience.launch.devices import identify
from resilience.launch.guardian import Guardian
from resilience.launch.lease import LeaseWatch
from resilience.launch.network import is_free, local_address_towards
from resilience.launch.processes import adopt_orphans, end_descendants
from resilience.launch.rendezvous import BACKEND, ResilienceRendezvous, RunStoppedError
from resilience.launch.run_directory import RunDirectory
from resilience.rpc.v1 import coordinator_pb2 as pb

__all__ = ["main"]

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
_PATIENCE_LEASES = 4
"""How many leases long a node without running ranks waits for a coordinator that does not answer."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the agent of this node; its exit code."""
    try:
        node = _node(list(sys.argv[1:] if argv is None else argv))
    except ResilienceError as error:
        print(f"resilience: {error}", file=sys.stderr)
        return error.exit_code
    adopt_orphans()
    try:
        with _PidFile(node):
            return _Life(node).run()
    except ResilienceError as error:  # nothing was started yet
        print(f"resilience: {error}", file=sys.stderr)
        return error.exit_code


def _node(argv: list[str]) -> Node:
    if len(argv) < 2 or argv[0] != "--resilience-context":
        raise UsageError("the agent needs --resilience-context PATH first; start it through `deepspeed --resilience`")
    context_path = Path(argv[1])
    context = RunContext.read(context_path)
    arguments = node_parser_arguments(argv[2:])
    world: dict[str, list[int]] = json.loads(base64.urlsafe_b64decode(arguments.world_info))
    name = list(world)[arguments.node_rank]
    is_first = arguments.node_rank == 0
    if is_first and not is_free("0.0.0.0", arguments.master_port):
        raise UsageError(f"--master_port {arguments.master_port}: in use on this node; give a free one")
    _check_script(arguments.training_script, is_path=not (arguments.module or arguments.no_python))
    _make_log_directory(arguments.enable_each_rank_log)
    return Node(
        name=name,
        node_rank=arguments.node_rank,
        num_nodes=len(world),
        address=arguments.master_addr if is_first else local_address_towards(arguments.master_addr),
        devices=tuple(identify(world[name], node=name, use_gpu=uses_gpu())),
        arguments=arguments,
        context=context,
        context_path=context_path,
        directory=RunDirectory(context.run_dir),
    )


def _check_script(script: str, *, is_path: bool) -> None:
    if is_path and not os.path.exists(script):
        raise UsageError(f"{script}: no such training script in {os.getcwd()}; check the path")


def _make_log_directory(name: str) -> None:
    if name == "None":
        return
    try:
        Path(name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--enable_each_rank_log {name}: cannot be made ({error.strerror})") from None


class _PidFile:
    """`--save_pid`: the agent's pid, in the file where DeepSpeed's launcher puts its own."""

    def __init__(self, node: Node) -> None:
        save_pid = node.arguments.save_pid
        self._path = pid_file(save_pid) if save_pid else None

    def __enter__(self) -> None:
        if self._path is not None:
            print(f"launcher pid: {os.getpid()}")
            self._path.write_text(str(os.getpid()))

    def __exit__(self, *_: object) -> None:
        if self._path is not None:
            self._path.unlink(missing_ok=True)


class _Life:
    """One agent from its first Join to its exit code."""

    def __init__(self, node: Node) -> None:
        config = node.context.config
        self._node = node
        self._member = f"agent:{node.name}"
        self._client = CoordinatorClient(node.context)
        self._reports = ReportStream(
            self._client, member=self._member, interval_s=config.coordinator.heartbeat_interval_s
        )
        self._lease = LeaseWatch(node.context.run_dir, lease_s=config.coordinator.lease_s)
        self._signal: signal.Signals | None = None
        self._guardian: Guardian | None = None
        self._state = NodeState(node)

    def run(self) -> int:
        """Start what ranks need and run them; the exit code.

        Raises:
            UsageError: what the configuration wants cannot be had here.
        """
        node = self._node
        self._install_signals()
        self._guardian = self._state.guardian = guardians.start(
            node.context,
            node.context_path,
            node=node.name,
            num_nodes=node.num_nodes,
            tell=lambda fact: self._reports.snapshots([fact]),
        )
        parameters = RendezvousParameters(
            backend=BACKEND,
            endpoint=self._client.address,
            run_id=self._client.run_id,
            min_nodes=1,
            max_nodes=self._node.num_nodes,
            client=self._client,
            reports=self._reports,
            describe=self._state.describe,
            interrupted=self._check,
            patience_s=_PATIENCE_LEASES * self._node.context.config.coordinator.lease_s,
            prepare=self._prepare,
        )
        rendezvous = get_rendezvous_handler(parameters)
        assert isinstance(rendezvous, ResilienceRendezvous)
        agent = Agent(
            self._node,
            self._state,
            rendezvous,
            self._reports,
            check=self._check,
            install_signals=self._install_signals,
            guardian=self._guardian,
        )
        code, reason = self._supervise(agent)
        if self._guardian is not None:
            if self._signal is not None:
                self._guardian.flush()
            self._guardian.stop()
        end_descendants()
        self._client.leave(generation=self._state.generation, member=self._member, exit_code=code, reason=reason)
        self._reports.close()
        self._client.close()
        if code != ExitCode.DONE:
            print(f"resilience: {self._node.name} ends with {code}: {reason}", file=sys.stderr)
        return code

    def _supervise(self, agent: Agent) -> tuple[int, str]:
        """Run generations until the end; the exit code and why."""
        try:
            agent.run()
        except RunStoppedError as stopped:
            return stopped.code, stopped.reason
        except SignalException as error:
            return ExitCode.REQUEUE, f"{error.sigval.name} from outside"
        except CoordinatorUnreachableError as error:
            if self._state.finished and self._node.num_nodes == 1:
                return ExitCode.DONE, "all ranks ended with 0; the coordinator was silent at the end"
            is_external = self._node.context.config.coordinator.address is not None
            return (ExitCode.UNAVAILABLE if is_external else ExitCode.REQUEUE), str(error)
        except ResilienceError as error:
            return error.exit_code, str(error)
        except OSError as error:
            return ExitCode.REQUEUE, f"the agent cannot start or watch its ranks ({error}); is a disk full?"
        raise AssertionError("the agent returned without an answer from the coordinator")

    def _prepare(self, assignment: pb.Assignment) -> bool:
        """Have ready what the ranks load; where it cannot be had, say why, and what the next Join says."""
        if self._guardian is None:
            return True
        problem = self._guardian.begin(assignment, interrupted=self._check)
        if problem:
            print(f"resilience: {self._node.name}: {problem}", file=sys.stderr)
            self._state.generation = assignment.generation
            self._state.ended((), problem)
        return not problem

    def _check(self) -> None:
        """Raise when this agent must end, whatever its ranks do."""
        if self._signal is not None:
            raise RunStoppedError(ExitCode.REQUEUE, f"{self._signal.name} from outside")
        if (stop := self._reports.stop) is not None:
            raise RunStoppedError(stop.exit_code, stop.reason)
        if (why := self._lease.ended()) is not None:
            raise RunStoppedError(ExitCode.REQUEUE, why)

    def _install_signals(self) -> None:
        for number in _SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """Only noted: an exception in the middle of starting or ending ranks would lose some of them."""
        self._signal = signal.Signals(number)


if __name__ == "__main__":
    sys.exit(main())
