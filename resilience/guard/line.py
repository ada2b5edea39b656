"""The client as the guard's `Reporter`: orders as numbers, and the end of the process announced."""

from __future__ import annotations

from typing import Any

from resilience.events import Decision, Evidence
from resilience.guard.client import Client
from resilience.guard.reporter import Fact, Orders

__all__ = ["LineToCoordinator"]


class LineToCoordinator:
    """Passes everything on to `client`, which is started already."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._has_left = False

    def orders(self) -> Orders:
        """What the coordinator has ordered so far. Reads attributes that the client's thread sets."""
        client = self._client
        stop, restart, drain, fenced = client.stop, client.restart, client.drain, client.fenced_reason
        order, snapshot = stop or restart or drain, client.take_snapshot
        joined = client.join_response
        return Orders(
            stop_code=stop.exit_code if stop is not None else 0,
            restart=restart is not None,
            fenced=fenced is not None,
            drain=drain is not None,
            rewind=1 + client.rewind.step if client.rewind is not None else 0,
            snapshot=snapshot.directive_id if snapshot is not None else "",
            reason=order.reason if order is not None else fenced or "",
            inherited_skips=joined.consecutive_skips if joined is not None else 0,
            deterministic=joined is not None and joined.deterministic,
        )

    def order_done(self, name: str) -> None:
        """Forget the order `rewind` or `take_snapshot`: it was carried out, or cannot be."""
        assert name in ("rewind", "take_snapshot"), name
        setattr(self._client, name, None)

    def report(self, fact: Fact, /) -> None:
        """See `Client.report`."""
        self._client.report(fact)

    def note(self, kind: str, message: str, *, step: int = 0) -> None:
        """See `Client.note`."""
        self._client.note(kind, message, step=step)

    def heartbeat(self, *, step_seconds: float | None = None, **fields: Any) -> None:
        """See `Client.heartbeat`."""
        self._client.heartbeat(step_seconds=step_seconds, **fields)

    def add_badput(self, cause: str, seconds: float) -> None:
        """See `Client.add_badput`."""
        self._client.add_badput(cause, seconds)

    def add_skipped_step(self) -> None:
        """See `Client.add_skipped_step`."""
        self._client.add_skipped_step()

    def set_deterministic(self, deterministic: bool) -> None:
        """See `Client.set_deterministic`."""
        self._client.set_deterministic(deterministic)

    def decide(self, evidence: Evidence, deadline_s: float) -> Decision | None:
        """See `Client.decide`."""
        return self._client.decide(evidence, deadline_s)

    def conclude(self, decision: Decision) -> None:
        """See `Client.conclude`."""
        self._client.conclude(decision)

    def leave(self, exit_code: int, reason: str) -> None:
        """Say goodbye, once; what comes later is not sent."""
        if not self._has_left:
            self._has_left = True
            self._client.leave(exit_code, reason)
