"""The agent of one node: torch elastic's local agent, with the coordinator in charge of generations and ranks.

What torch elastic does well stays with it: starting, watching and ending the group of ranks. Overridden is only what
the coordinator decides (places, restarts, the end), and how ranks are ended: quickly, with everything they started.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch.distributed.elastic.agent.server.api import RunResult, Worker, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs
from torch.distributed.elastic.multiprocessing.api import SubprocessContext

from resilience.clock import SystemClock
from resilience.context import RunContext
from resilience.events import RankExit
from resilience.last_place import path_of, read_end, read_place
from resilience.launch import shim
from resilience.launch.client import ReportStream
from resilience.launch.guardian import Guardian
from resilience.launch.network import free_port
from resilience.launch.processes import end_sessions
from resilience.launch.ranks import RankFiles, last_line, plan_ranks, write_plan
from resilience.launch.rendezvous import ResilienceRendezvous
from resilience.launch.run_directory import Endpoint, RunDirectory
from resilience.launch.shared_memory import remove_buffers
from resilience.launch.standby import Standby
from resilience.launch.tee import Tee
from resilience.rpc import codec
from resilience.rpc.v1 import coordinator_pb2 as pb

__all__ = ["Agent", "Node", "NodeState"]

_MONITOR_INTERVAL_S = 0.05
_BROKEN_GRACE_S = 1.0
"""Most that ranks get to end after SIGTERM when one of them has failed: no collective of theirs will ever end."""
_UNLIMITED = 1_000_000
"""Restarts that torch elastic may do: the budget is the coordinator's."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Node:
    """What does not change while the agent lives."""

    name: str
    node_rank: int
    num_nodes: int
    address: str
    devices: tuple[pb.Device, ...]
    arguments: argparse.Namespace
    """Those of DeepSpeed's per-node launcher."""
    context: RunContext
    context_path: Path
    directory: RunDirectory


class NodeState:
    """How the last generation ended here: what the next Join tells."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self.guardian: Guardian | None = None
        """Of this node's snapshots; None where there is no memory tier."""
        self.generation = 0
        self.exits: tuple[RankExit, ...] = ()
        self.reason = "first start"

    @property
    def finished(self) -> bool:
        """Whether all ranks of this node ended with 0."""
        return bool(self.exits) and all(exit_.exit_code == 0 for exit_ in self.exits)

    def ended(self, exits: Sequence[RankExit], reason: str) -> None:
        """Remember how the current generation ended."""
        self.exits, self.reason = tuple(exits), reason

    def describe(self) -> pb.AgentInfo:
        """Ask for a place in the next generation."""
        node = self._node
        # The first generation meets where the launch said; later ones elsewhere, for the old port may linger.
        port = node.arguments.master_port if self.generation == 0 else free_port("0.0.0.0")
        guardian = self.guardian
        if guardian is not None and self.generation:
            guardian.settle()
        return pb.AgentInfo(
            node=node.name,
            node_rank=node.node_rank,
            num_nodes=node.num_nodes,
            address=node.address,
            devices=node.devices,
            pid=os.getpid(),
            last_generation=self.generation,
            exits=[codec.to_proto(exit_) for exit_ in self.exits],
            reason=self.reason,
            master_port=port,
            snapshots=[] if guardian is None else guardian.inventory(),
            guardian_address="" if guardian is None else guardian.address(),
        )


class _Logs(LogsSpecs):
    """Tells torch elastic where the output of each rank goes. The copy to the console is ours (tee.py)."""

    def __init__(self, directory: RunDirectory) -> None:
        super().__init__(log_dir=str(directory.logs))
        self.files: list[RankFiles] = []

    @property
    def root_log_dir(self) -> str:
        return str(self._root_log_dir)

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        destination = LogsDest()
        for local_rank, files in enumerate(self.files):
            error_file = str(files.err.with_suffix(".error.json"))
            envs[local_rank]["TORCHELASTIC_ERROR_FILE"] = error_file
            destination.stdouts[local_rank] = str(files.out)
            destination.stderrs[local_rank] = str(files.err)
            destination.error_files[local_rank] = error_file
        return destination


class Agent(LocalElasticAgent):
    """Runs the ranks of one node until the coordinator says that the run is over."""

    def __init__(
        self,
        node: Node,
        state: NodeState,
        rendezvous: ResilienceRendezvous,
        reports: ReportStream,
        *,
        check: Callable[[], None],
        install_signals: Callable[[], None],
        guardian: Guardian | None = None,
    ) -> None:
        """Prepare; `run` does the work.

        Args:
            node: this node.
            state: what the next Join tells.
            rendezvous: asks the coordinator.
            reports: tells the coordinator how ranks ended.
            check: raises when the agent must end (a signal, an order, the launcher's lease).
            install_signals: puts the agent's signal handlers back, which torch elastic replaces at every start.
            guardian: of this node's snapshots; None where there is no memory tier.
        """
        self._node = node
        self._state = state
        self._rendezvous_handler = rendezvous
        self._reports = reports
        self._check = check
        self._install_signals = install_signals
        self._guardian = guardian
        self._logs = _Logs(node.directory)
        self._tee: Tee | None = None
        self._standby = Standby.of(node.context, node=node.name, logs=node.directory.logs)
        self._aborted: set[int] = set()
        self._log_prefix = time.strftime("%Y%m%d%H%M%S", time.localtime())
        self._grace_s = node.context.config.launch.stop_grace_s
        spec = WorkerSpec(
            role="default",
            local_world_size=len(node.devices),
            entrypoint=sys.executable,
            rdzv_handler=rendezvous,
            max_restarts=_UNLIMITED,
            monitor_interval=_MONITOR_INTERVAL_S,
        )
        super().__init__(spec, self._logs)

    # --- places: the coordinator's word instead of an exchange through a store

    def _assign_worker_ranks(
        self, store: Any, group_rank: int, group_world_size: int, spec: WorkerSpec
    ) -> list[Worker]:
        assignment = self._rendezvous_handler.assignment
        spec.local_world_size = len(assignment.slots)
        return [
            Worker(
                local_rank=local_rank,
                global_rank=assignment.first_rank + local_rank,
                role_rank=assignment.first_rank + local_rank,
                world_size=assignment.world_size,
                role_world_size=assignment.world_size,
            )
            for local_rank in range(len(assignment.slots))
        ]

    def _exit_barrier(self) -> None:
        """The next Join is the barrier: it is answered when all nodes are done, or with a new generation."""

    def _invoke_run(self, role: str = "default") -> RunResult:
        """Run generations until `next_rendezvous` raises, also after one whose local ranks all ended with 0."""
        while True:
            super()._invoke_run(role)
            self._end_group()
            self._state.ended(self._exits(), "all ranks of this node ended with 0")

    # --- starting

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        assignment = self._rendezvous_handler.assignment
        self._state.generation = assignment.generation
        self._state.ended((), "")
        self._aborted.clear()
        directory = self._node.directory
        logs = directory.generation_logs(assignment.generation)
        endpoint = Endpoint(assignment.master_addr, assignment.master_port)
        directory.write_endpoint(assignment.generation, self._node.name, endpoint)
        self._remove_buffers()
        each_rank_logs = [self._each_rank_log(worker.global_rank) for worker in worker_group.workers]
        self._logs.files = [
            RankFiles.of(logs, worker.global_rank, each_rank_log=log)
            for worker, log in zip(worker_group.workers, each_rank_logs, strict=True)
        ]
        plan_path = logs / f"ranks-{self._node.name}.json"
        plan = plan_ranks(
            self._node.arguments,
            context=self._node.context,
            context_path=self._node.context_path,
            node=self._node.name,
            assignment=assignment,
            devices=self._devices(assignment.slots),
            each_rank_logs=each_rank_logs,
            arena=None if self._guardian is None else self._guardian.arena.path,
            restore=None if self._guardian is None else self._guardian.restore,
        )
        write_plan(plan_path, plan)
        worker_group.spec.args = (
            *("-I", "-S", shim.__file__),
            *("rank", str(os.getpid()), str(int(signal.SIGKILL)), str(plan_path)),
        )
        with self._standby.installed():
            pids: dict[int, Any] = super()._start_workers(worker_group)
        self._install_signals()
        self._tee = Tee(
            [
                *((files.out, sys.stdout.buffer) for files in self._logs.files),
                *((files.err, sys.stderr.buffer) for files in self._logs.files),
            ]
        )
        return pids

    def _devices(self, slots: Sequence[int]) -> list[pb.Device]:
        by_slot = {device.slot: device for device in self._node.devices}
        return [by_slot[slot] for slot in slots]

    def _each_rank_log(self, rank: int) -> Path | None:
        """DeepSpeed's name for it; one file for all generations of this launch."""
        directory = self._node.arguments.enable_each_rank_log
        if directory == "None":
            return None
        return Path(directory).absolute() / f"{self._log_prefix}_rank{rank}.log"

    # --- watching

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        """One look at the ranks decides; torch elastic's own look comes only after the group was ended."""
        self._check()
        if self._guardian is not None:
            self._guardian.keep_alive()
        exits = self._exits()
        failed = [exit_ for exit_ in exits if exit_.exit_code != 0]
        if failed:
            # Tell at once, before the other ranks are ended: agents elsewhere may have ranks that wait for these.
            self._reports.exits(failed)
            self._state.ended(failed, "a rank failed")
            self._end_group(min(self._grace_s, _BROKEN_GRACE_S))
        elif len(exits) < len(worker_group.workers):
            if self._reports.restart is not None:
                self._state.ended((), self._reports.restart.reason)
            self._standby.keep_ready()
            return RunResult(state=WorkerState.HEALTHY)
        else:
            # torch elastic's own look would take a rank that aborted after its end for a failed one.
            return RunResult(state=WorkerState.SUCCEEDED)
        result: RunResult = super()._monitor_workers(worker_group)
        return result

    def _exits(self) -> list[RankExit]:
        """How the ranks of this node ended that have ended."""
        assert isinstance(self._pcontext, SubprocessContext)
        devices = self._devices(self._rendezvous_handler.assignment.slots)
        found = []
        for local_rank, handler in self._pcontext.subprocess_handlers.items():
            code = handler.proc.poll()
            if code is None:
                continue
            files = self._logs.files[local_rank]
            rank = self._rendezvous_handler.assignment.first_rank + local_rank
            place_path = path_of(self._node.context.run_dir, self._state.generation, rank)
            place = read_place(place_path)
            code = self._own_code(code, rank, read_end(place_path))
            found.append(
                RankExit(
                    generation=self._state.generation,
                    rank=rank,
                    node=self._node.name,
                    device=devices[local_rank].device,
                    exit_code=code,
                    message="" if code == 0 else last_line(files.log or files.err),
                    step=0 if place is None else place.step,
                    exited_at=SystemClock().wall(),
                )
            )
        return found

    def _own_code(self, code: int, rank: int, own: int | None) -> int:
        """The code that counts: a rank that had ended by itself may abort while its interpreter shuts down."""
        if code != -signal.SIGABRT or own is None:
            return code
        if rank not in self._aborted:
            self._aborted.add(rank)
            print(
                f"resilience: rank {rank} ended with {own}, then its interpreter aborted (SIGABRT); the {own} counts",
                file=sys.stderr,
            )
        return own

    # --- ending

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: float = 30) -> None:
        self._end_group()

    def _end_group(self, grace_s: float | None = None) -> None:
        """SIGTERM, the grace period, SIGKILL; then whatever the ranks started, their output, their shared memory."""
        if not isinstance(self._pcontext, SubprocessContext):
            return
        self._pcontext.close(signal.SIGTERM, math.ceil(self._grace_s if grace_s is None else grace_s))
        end_sessions(set(self._pcontext.pids().values()))
        if self._tee is not None:
            self._tee.stop()
            self._tee = None
        self._remove_buffers()

    def _remove_buffers(self) -> None:
        assignment = self._rendezvous_handler.assignment
        remove_buffers([(assignment.master_addr, assignment.master_port)])
