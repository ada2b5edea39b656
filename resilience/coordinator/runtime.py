"""The coordinator as a process: ports, signals, the loop, and what is left behind at the end."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import json
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health  # type: ignore[attr-defined]  # grpc-stubs lacks it
from grpc_reflection.v1alpha import reflection

import resilience
from resilience.clock import Clock, SystemClock
from resilience.config import Config
from resilience.context import RunContext
from resilience.coordinator.access import TokenInterceptor, check_bind, read_token
from resilience.coordinator.devices import DeviceHistory
from resilience.coordinator.host import Host
from resilience.coordinator.journal import Journal
from resilience.coordinator.log import Log
from resilience.coordinator.machine import commands as c
from resilience.coordinator.machine.facts import Opened
from resilience.coordinator.paths import devices_path, journal_path
from resilience.coordinator.report import write_report
from resilience.coordinator.service import CoordinatorService, OperatorService
from resilience.coordinator.tracing import open_tracing
from resilience.coordinator.web import MetricsServer
from resilience.errors import ExitCode, ResilienceError, UsageError
from resilience.rpc.codec import GRPC_OPTIONS
from resilience.rpc.tls import Tls, add_port
from resilience.rpc.v1 import coordinator_pb2, coordinator_pb2_grpc, operator_pb2, operator_pb2_grpc

__all__ = ["DEFAULT_METRICS_PORT", "Settings", "serve", "settings_of"]

DEFAULT_METRICS_PORT = 9464
_TICK_S = 0.25
_GRACE_S = 0.3
"""How long calls may go on when the process ends."""

_SERVICES = (
    coordinator_pb2.DESCRIPTOR.services_by_name["Coordinator"].full_name,
    operator_pb2.DESCRIPTOR.services_by_name["Operator"].full_name,
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What one coordinator process serves, and where."""

    run_id: str
    run_dir: Path
    bind: str
    dialled: str
    """Host under which others reach what listens on `bind`."""
    port: int
    """0 takes a free one."""
    metrics_bind: str
    metrics_port: int | None
    """None takes 9464; 0 a free one."""
    metrics_port_may_move: bool
    """Whether another port is taken when that one is busy: a port that somebody asked for may not."""
    token_file: Path | None
    config: Config
    journal: Path
    devices: Path


def settings_of(context: RunContext, *, port: int | None = None, metrics_port: int | None = None) -> Settings:
    """The settings of an embedded coordinator, from the run's context; explicit ports beat it.

    Raises:
        UsageError: the context's address is not `host:port`.
    """
    config = context.config.coordinator
    host, _, named = context.coordinator_address.rpartition(":")
    if not host or not named.isdecimal():
        raise UsageError(f"coordinator address {context.coordinator_address!r} is not host:port")
    return Settings(
        run_id=context.run_id,
        run_dir=context.run_dir,
        bind=config.bind,
        dialled=host,
        port=int(named) if port is None else port,
        metrics_bind=config.metrics_bind,
        metrics_port=config.metrics_port if metrics_port is None else metrics_port,
        # The launcher found its port free a moment ago; another run may have been quicker.
        metrics_port_may_move=config.metrics_port is None,
        token_file=context.token_file,
        config=context.config,
        journal=journal_path(os.environ, context.run_id),
        devices=devices_path(os.environ),
    )


def serve(settings: Settings, *, clock: Clock | None = None) -> int:
    """Serve a run until SIGTERM or SIGINT. Its report and the journal's copy are written when the run has ended, and
    again when the process does: what came late is in them, too.

    Returns:
        The code that the coordinator's own process ends with: 0 after an orderly end.

    Raises:
        UsageError: a port is busy, or the token is missing or open to others.
        ResilienceError: the journal, the device history or the report cannot be read or written.
    """
    return asyncio.run(_serve(settings, clock or SystemClock()))


async def _serve(settings: Settings, clock: Clock) -> int:
    token = read_token(settings.token_file)
    check_bind(settings.bind, token, Tls.of(settings.config.coordinator))
    try:
        settings.run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"run directory {settings.run_dir} cannot be made ({error.strerror}); choose another"
        ) from None
    tracing = open_tracing(settings.config.coordinator.traces)
    stop = _stop_event()
    with contextlib.ExitStack() as stack:
        server, port = _listen(settings, token)
        try:
            journal = stack.enter_context(Journal.open(settings.journal))
            history = DeviceHistory(settings.devices)
            stack.callback(history.close)
            host = Host.start(_opened(settings, clock), journal, history, clock, pid=os.getpid())
            await _announce(server, host)
            metrics = _metrics(settings, host)
            log = Log(sys.stderr, form=settings.config.coordinator.log, run_id=settings.run_id)
            _write_addresses(settings, port, metrics.address, log, host.now())
            log.go_on(host.machine.state, after=host.num_lines_recorded)
            host.observers = [log, tracing]
            await _run(host, stop, lambda: _tell_of_end(host, journal, settings, log))
            await asyncio.to_thread(metrics.close)
        finally:
            await server.stop(_GRACE_S)
        if host.broken is not None:
            raise host.broken
        host.submit(c.Close(reason=f"the coordinator was ended by {stop.reason} before the run had ended"))
        _leave_behind(host, journal, settings)
    tracing.close()  # at last: who collects spans may be slow, or gone
    return int(ExitCode.DONE)


class _Stop(asyncio.Event):
    """Set by a signal; `reason` names it."""

    reason = "its launcher"


def _stop_event() -> _Stop:
    stop = _Stop()

    def note(number: signal.Signals) -> None:
        stop.reason = number.name
        stop.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, note, number)
    return stop


def _opened(settings: Settings, clock: Clock) -> Opened:
    config = settings.config
    return Opened(
        run_id=settings.run_id,
        mode=config.mode,
        limits=config.policy,
        lease_s=config.coordinator.lease_s,
        started_at=clock.wall(),
        version=resilience.__version__,
        num_spare_nodes=config.launch.num_spare_nodes,
        node_wait_s=config.launch.node_wait_s,
        config_digest=hashlib.sha256(config.model_dump_json().encode()).hexdigest()[:16],
    )


def _listen(settings: Settings, token: str | None) -> tuple[grpc.aio.Server, int]:
    """Bind the port before anything is written, so that a busy one leaves no trace."""
    interceptors = [TokenInterceptor(token)] if token is not None else []
    # Without SO_REUSEPORT a second coordinator cannot share the port unnoticed.
    server = grpc.aio.server(interceptors=interceptors, options=(*GRPC_OPTIONS, ("grpc.so_reuseport", 0)))
    address = f"{settings.bind}:{settings.port}"
    try:
        _probe(settings.bind, settings.port)
        return server, add_port(server, address, Tls.of(settings.config.coordinator))
    except (OSError, RuntimeError) as error:
        why = getattr(error, "strerror", None) or "it was taken at this moment"
        raise UsageError(f"coordinator address {address} cannot be used ({why}); choose another port") from None


def _probe(host: str, port: int) -> None:
    """Raise OSError where `host`:`port` cannot be bound. gRPC would say so in its own log, not in one clear line."""
    family, kind, protocol, _, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(address)


async def _announce(server: grpc.aio.Server, host: Host) -> None:
    coordinator_pb2_grpc.add_CoordinatorServicer_to_server(CoordinatorService(host), server)
    operator_pb2_grpc.add_OperatorServicer_to_server(OperatorService(host, pid=os.getpid()), server)
    probe = health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(probe, server)
    for name in ("", *_SERVICES):
        await probe.set(name, health_pb2.HealthCheckResponse.SERVING)
    reflection.enable_server_reflection((*_SERVICES, reflection.SERVICE_NAME), server)
    await server.start()


def _metrics(settings: Settings, host: Host) -> MetricsServer:
    wanted = DEFAULT_METRICS_PORT if settings.metrics_port is None else settings.metrics_port
    try:
        return MetricsServer(host, bind=settings.metrics_bind, port=wanted)
    except OSError as error:
        if settings.metrics_port_may_move:
            return MetricsServer(host, bind=settings.metrics_bind, port=0)
        address = f"{settings.metrics_bind}:{wanted}"
        raise UsageError(f"metrics address {address} cannot be used ({error.strerror}); choose another port") from None


def _write_addresses(settings: Settings, port: int, metrics_address: str, log: Log, now: float) -> None:
    """`coordinator.json`: how commands find the coordinator of a run directory."""
    path = settings.run_dir / "coordinator.json"
    content = {
        "address": f"{settings.dialled}:{port}",
        "metrics_address": metrics_address,
        "pid": os.getpid(),
        "token_file": None if settings.token_file is None else str(settings.token_file),
        "tls": None if (tls := Tls.of(settings.config.coordinator)) is None else tls.told(),
        "run_id": settings.run_id,
    }
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
        temporary.replace(path)
    except OSError as error:
        # One that was started again on a full disk is still found: its address is the one that stands there.
        temporary.unlink(missing_ok=True)
        log.say(now, "note", f"{path} cannot be written ({error.strerror}); is the disk full?", {}, level="error")
    where = f"{content['address']}, metrics http://{metrics_address}/metrics"
    log.say(now, "note", f"coordinator of run {settings.run_id}: {where}", {"pid": os.getpid()})


def _leave_behind(host: Host, journal: Journal, settings: Settings) -> None:
    """Write what stays of the run.

    Raises:
        ResilienceError: the report or the journal's copy cannot be written.
    """
    try:
        write_report(host.machine.state, settings.run_dir / "report.json", host.now())
    finally:
        journal.copy_to(settings.run_dir / "journal.db")


def _tell_of_end(host: Host, journal: Journal, settings: Settings, log: Log) -> None:
    """The same while the process goes on, which it does whatever becomes of it."""
    try:
        _leave_behind(host, journal, settings)
    except ResilienceError as error:
        log.say(host.now(), "note", f"{error}; it is tried again when the coordinator ends", {}, level="error")


async def _run(host: Host, stop: _Stop, tell_of_end: Callable[[], None]) -> None:
    """Tick until the process is told to end, or cannot go on. A finished run is served on: people may still ask."""
    has_told = False
    while not stop.is_set() and host.broken is None:
        host.submit(c.Tick())
        if host.finished.is_set() and not has_told:
            has_told = True
            tell_of_end()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), _TICK_S)
