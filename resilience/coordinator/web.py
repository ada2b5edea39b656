"""What the coordinator says over HTTP: `/metrics` for Prometheus, `/healthz` and `/readyz` for whoever watches over it.

Plain HTTP, answered on threads of its own; reads the state on the coordinator's event loop, where nothing changes it
meanwhile. Nothing here changes anything, and probes learn nothing about the run.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import socket
import socketserver
import threading
import wsgiref.simple_server
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from resilience.coordinator.host import Host
from resilience.coordinator.scrape import families

__all__ = ["MetricsServer"]

T = TypeVar("T")
_ANSWER_S = 5.0
"""How long the event loop may take: as long as nothing else in this process answers either."""

StartResponse = Callable[[str, list[tuple[str, str]]], Any]
Application = Callable[[dict[str, Any], StartResponse], Iterable[bytes]]


class _Loop:
    """Runs small reads on the coordinator's event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop

    def read(self, what: Callable[[], T]) -> T:
        """What `what` returns there.

        Raises:
            TimeoutError: the loop is stuck.
        """

        async def call() -> T:
            return what()

        return asyncio.run_coroutine_threadsafe(call(), self._loop).result(_ANSWER_S)


class _StateCollector(Collector):
    def __init__(self, host: Host, loop: _Loop) -> None:
        self._host = host
        self._loop = loop

    def collect(self) -> Iterable[Metric]:
        return self._loop.read(lambda: list(families(self._host.machine, self._host.now())))

    def describe(self) -> Iterable[Metric]:
        return []


class _Quiet(wsgiref.simple_server.WSGIRequestHandler):
    """Scrapes and probes come every few seconds: they are no news."""

    def log_message(self, format: str, *args: Any) -> None:
        pass


class _Server(socketserver.ThreadingMixIn, wsgiref.simple_server.WSGIServer):
    daemon_threads = True


class _ServerOfVersion6(_Server):
    address_family = socket.AF_INET6


class MetricsServer:
    """The HTTP side of a coordinator, on a thread of its own."""

    def __init__(self, host: Host, *, bind: str, port: int) -> None:
        """Listen on `bind`:`port`; port 0 takes a free one.

        Raises:
            OSError: the port is busy.
        """
        loop = _Loop(asyncio.get_running_loop())
        registry = CollectorRegistry()
        registry.register(_StateCollector(host, loop))
        kind = _ServerOfVersion6 if ":" in bind else _Server
        self._server = wsgiref.simple_server.make_server(
            bind.strip("[]"), port, _application(host, loop, make_wsgi_app(registry)), kind, _Quiet
        )
        self.address = f"{bind}:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, name="http", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening. Call it from another thread while the event loop runs: a scrape may be going on."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _application(host: Host, loop: _Loop, metrics: Application) -> Application:
    def answer(environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "")
        if path == "/metrics":
            return metrics(environ, start_response)
        if path not in ("/healthz", "/readyz"):
            return _plain(start_response, "404 Not Found", "try /metrics, /healthz or /readyz")
        try:
            broken = loop.read(lambda: host.broken)
        except concurrent.futures.TimeoutError:
            return _plain(start_response, "503 Service Unavailable", f"no answer from within for {_ANSWER_S:.0f} s")
        # One that cannot write its journal ends by itself, and must not be killed before it has said so.
        if broken is not None and path == "/readyz":
            return _plain(start_response, "503 Service Unavailable", "the journal cannot be written")
        return _plain(start_response, "200 OK", "ok")

    return answer


def _plain(start_response: StartResponse, status: str, text: str) -> Iterable[bytes]:
    start_response(status, [("Content-Type", "text/plain; charset=utf-8")])
    return [f"{text}\n".encode()]
