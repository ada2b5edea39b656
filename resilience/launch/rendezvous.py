"""The rendezvous handler `resilience`: torch elastic asks it for a place, and it asks the coordinator.

The coordinator mints generations and assigns ranks in hostfile order. Its order to restart shows as
`num_nodes_waiting() > 0`, its order to stop as `RunStoppedError`. The store that torch elastic wants is local to each
agent and unused: ranks and the end of the run are agreed on through the coordinator, so no agent depends on another's.
"""

from __future__ import annotations

from collections.abc import Callable

from torch._C._distributed_c10d import HashStore
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)

from resilience.errors import ResilienceError
from resilience.launch.client import CoordinatorClient, ReportStream
from resilience.rpc.v1 import coordinator_pb2 as pb

__all__ = ["BACKEND", "ResilienceRendezvous", "RunStoppedError", "create"]

BACKEND = "resilience"

_WAIT_S = 1.0
"""How long the coordinator may hold a Join: short, because a signal waits for its end."""


class RunStoppedError(ResilienceError):
    """The run is over; the agent ends with `code`."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


class ResilienceRendezvous(RendezvousHandler):
    """One node's view of the run's generations."""

    def __init__(
        self,
        *,
        client: CoordinatorClient,
        reports: ReportStream,
        describe: Callable[[], pb.AgentInfo],
        interrupted: Callable[[], None],
        patience_s: float,
        prepare: Callable[[pb.Assignment], bool],
    ) -> None:
        """Ask through `client`.

        Args:
            client: calls to the coordinator.
            reports: where its orders come in.
            describe: what this node offers now, and how its last generation ended.
            interrupted: raises when the agent was told to end by other means.
            patience_s: how long an unreachable coordinator is waited for.
            prepare: makes ready what an assignment needs; False where it cannot be had, so that another is asked for.
        """
        self._client = client
        self._reports = reports
        self._describe = describe
        self._interrupted = interrupted
        self._patience_s = patience_s
        self._prepare = prepare
        self._closed = False
        self.assignment = pb.Assignment()
        """The place in the current generation."""

    def get_backend(self) -> str:
        return BACKEND

    def next_rendezvous(self) -> RendezvousInfo:
        """Wait for a place in the next generation.

        Raises:
            RunStoppedError: the run is over.
            CoordinatorUnreachableError: nobody answered.
        """
        self.assignment = self._place()
        while not self._prepare(self.assignment):
            self.assignment = self._place()
        meeting = RendezvousStoreInfo(self.assignment.master_addr, self.assignment.master_port)
        return RendezvousInfo(HashStore(), self.assignment.node_index, self.assignment.num_nodes, meeting)

    def _place(self) -> pb.Assignment:
        response = self._client.join(
            self._describe(), wait_s=_WAIT_S, patience_s=self._patience_s, interrupted=self._interrupted
        )
        if response.status == pb.JoinResponse.STOP:
            raise RunStoppedError(response.exit_code, response.reason)
        assert response.status == pb.JoinResponse.READY, f"Join answered {response.status}"
        self._reports.begin(response.assignment.generation)
        return response.assignment

    def num_nodes_waiting(self) -> int:
        return int(self._reports.restart is not None)

    def is_closed(self) -> bool:
        return self._closed

    def set_closed(self) -> None:
        self._closed = True

    def get_run_id(self) -> str:
        return self._client.run_id

    def shutdown(self) -> bool:
        self._closed = True
        return True


def create(parameters: RendezvousParameters) -> ResilienceRendezvous:
    """Build the handler from torch elastic's parameters, which carry our parts as they are."""
    return ResilienceRendezvous(
        client=parameters.config["client"],
        reports=parameters.config["reports"],
        describe=parameters.config["describe"],
        interrupted=parameters.config["interrupted"],
        patience_s=parameters.config["patience_s"],
        prepare=parameters.config["prepare"],
    )


rendezvous_handler_registry.register(BACKEND, create)
