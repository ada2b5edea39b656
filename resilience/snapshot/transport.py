"""How guardians of a run talk to each other: a gRPC server for what this node holds, and a client for each peer.

Whoever calls shows the run's token and names its run and generation; another run, or a generation that has ended, is
refused. Nothing is written here on a peer's word. A stream that breaks is taken up at the first byte that is missing,
and every piece carries its digest. The address is the one from which this machine reaches the coordinator: loopback
where that is here.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import hmac
import ipaddress
import os
import socket
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import grpc
import xxhash

from resilience.clock import Clock, SystemClock
from resilience.errors import SnapshotError
from resilience.rpc.codec import GRPC_OPTIONS, BoundsError, check_bounds
from resilience.rpc.tls import Tls, add_port, open_channel
from resilience.rpc.v1 import guardian_pb2 as pb
from resilience.rpc.v1 import guardian_pb2_grpc as rpc
from resilience.snapshot.holdings import Description, Holdings, Kind, Ref, Stored
from resilience.snapshot.kept import Key
from resilience.snapshot.volume import BLOCK_BYTES

__all__ = ["Caller", "Exchanges", "Pace", "PeerClient", "RefusalError", "Server", "own_host", "run_idle"]

if TYPE_CHECKING:
    _Interceptor = grpc.ServerInterceptor[Any, Any]
else:
    _Interceptor = grpc.ServerInterceptor

T = TypeVar("T")

_WINDOW_BYTES = 32 * BLOCK_BYTES
"""Asked for in one call, so that a deadline bounds how long a peer may be silent."""
_WINDOW_S = 30.0
_CALL_S = 5.0
_BACKOFF_S = (0.05, 0.1, 0.2, 0.5, 1.0)
_NUM_TRIES = 6
"""In a row, without one byte of progress."""
_MAX_THREADS = 32
_MAX_CALLS = 256
_LOST = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.ABORTED,
        grpc.StatusCode.DATA_LOSS,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
    }
)
_OPTIONS = (
    *GRPC_OPTIONS,
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 500),
)


class _DamagedError(Exception):
    """A piece is not what was sent."""


class RefusalError(SnapshotError):
    """A member cannot take part in an exchange, and says why."""


class Exchanges(Protocol):
    """What a member does in its group's exchanges."""

    @property
    def generation(self) -> int:
        """The one that this node is in; 0 before the first."""

    def advance(
        self, phase: pb.ExchangeRequest.Phase, key: Key, *, leader: str, members: tuple[str, ...], losses: int
    ) -> bool:
        """Do a phase; whether it is done.

        Raises:
            RefusalError: it cannot be done.
        """


class Caller:
    """Who calls: what every request of a guardian begins with."""

    def __init__(self, run_id: str, node: str, generation: Callable[[], int]) -> None:
        self._run_id = run_id
        self._node = node
        self._generation = generation

    def message(self) -> pb.Caller:
        return pb.Caller(run_id=self._run_id, generation=self._generation(), node=self._node)


def own_host(coordinator: str) -> str:
    """The address of this machine from which it reaches the coordinator, and at which others of the run reach it."""
    host = coordinator.rpartition(":")[0].strip("[]")
    with contextlib.suppress(OSError):
        family, kind, _, _, address = socket.getaddrinfo(host or "127.0.0.1", 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)  # nothing is sent: this only asks for the route
            return str(probe.getsockname()[0])
    return "127.0.0.1"


def run_idle() -> None:
    """Leave the processors to the ranks: this thread takes what nobody else wants."""
    with contextlib.suppress(OSError):  # a container may forbid it
        os.sched_setscheduler(threading.get_native_id(), os.SCHED_IDLE, os.sched_param(0))


# ------ serving


class Server:
    """Serves what a node holds to the other guardians of its run."""

    def __init__(
        self, holdings: Holdings, exchanges: Exchanges, *, run_id: str, token: str | None, tls: Tls | None = None
    ) -> None:
        self._token = token
        self._tls = tls
        # Whatever a peer asks for must not take time from the ranks of this node.
        self._pool = concurrent.futures.ThreadPoolExecutor(_MAX_THREADS, "serve", initializer=run_idle)
        self._server = grpc.server(
            self._pool,
            interceptors=[] if token is None else [_Token(token)],
            options=(*_OPTIONS, ("grpc.so_reuseport", 0)),
            maximum_concurrent_rpcs=_MAX_CALLS,
        )
        rpc.add_GuardianServicer_to_server(_Service(holdings, exchanges, run_id), self._server)

    def start(self, host: str, port: int = 0) -> str:
        """Listen; the address at which others reach this server.

        Args:
            host: the address to listen on.
            port: the port that an earlier guardian had, which peers still know; taken if it is free.

        Raises:
            SnapshotError: the address is open to others and there is neither token nor certificate, or it cannot be
                listened on.
            UsageError: the certificates cannot be used.
        """
        if self._token is None and self._tls is None and not ipaddress.ip_address(host).is_loopback:
            raise SnapshotError(
                f"guardians would be open to other machines at {host} and the run has no token; set "
                "coordinator.token_file or coordinator.tls_ca"
            )
        literal = f"[{host}]" if ":" in host else host
        for candidate in dict.fromkeys((port, 0)):
            with contextlib.suppress(RuntimeError):
                bound = add_port(self._server, f"{literal}:{candidate}", self._tls)
                self._server.start()
                return f"{literal}:{bound}"
        raise SnapshotError(f"guardian cannot listen on {host}")

    def stop(self) -> None:
        """Stop listening, and end the calls that are going on."""
        self._server.stop(0).wait(1.0)
        self._pool.shutdown(wait=False, cancel_futures=True)


class _Token(_Interceptor):
    """Refuses calls without the token, before their messages are read."""

    def __init__(self, token: str) -> None:
        self._expected = f"Bearer {token}".encode()

    def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        handler = continuation(handler_call_details)
        given = dict(handler_call_details.invocation_metadata or ()).get("authorization", "")
        given_bytes = given if isinstance(given, bytes) else given.encode("utf-8", "replace")
        if handler is None or hmac.compare_digest(given_bytes, self._expected):
            return handler
        code = grpc.StatusCode.PERMISSION_DENIED if given else grpc.StatusCode.UNAUTHENTICATED

        def refuse(_: Any, context: grpc.ServicerContext) -> Any:
            context.abort(code, "wrong token; guardians show the token of their run" if given else "no token")

        make = grpc.unary_stream_rpc_method_handler if handler.response_streaming else None
        return (make or grpc.unary_unary_rpc_method_handler)(refuse)


class _Service(rpc.GuardianServicer):
    def __init__(self, holdings: Holdings, exchanges: Exchanges, run_id: str) -> None:
        self._holdings = holdings
        self._exchanges = exchanges
        self._run_id = run_id

    def Describe(self, request: pb.DescribeRequest, context: grpc.ServicerContext) -> pb.DescribeResponse:
        self._admit(request, request.caller, context)
        found = self._holdings.describe(self._exchanges.generation)
        return pb.DescribeResponse(
            generation=found.generation,
            snapshots=[_key_message(key) for key in sorted(found.snapshots)],
            parity=[
                pb.ParitySet(
                    snapshot=_key_message(each.key), members=each.members, losses=each.losses, complete=each.complete
                )
                for each in found.parity
            ],
        )

    def Read(self, request: pb.ReadRequest, context: grpc.ServicerContext) -> Iterator[pb.Chunk]:
        self._admit(request, request.caller, context)
        ref = _ref(request)
        if ref is None or (request.end and request.start > request.end):
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "what is to be read?")
        offset = request.start
        try:
            for block in self._holdings.read(ref, request.start, request.end or None):
                yield pb.Chunk(offset=offset, content=block, digest=xxhash.xxh3_64_intdigest(block))
                offset += len(block)
        except SnapshotError as error:
            context.abort(grpc.StatusCode.NOT_FOUND, str(error))

    def Exchange(self, request: pb.ExchangeRequest, context: grpc.ServicerContext) -> pb.ExchangeResponse:
        self._admit(request, request.caller, context)
        if request.caller.generation != self._exchanges.generation:
            # The leader is ahead of this member, which will be told soon.
            context.abort(grpc.StatusCode.ABORTED, f"still in generation {self._exchanges.generation}")
        try:
            done = self._exchanges.advance(
                request.phase,
                _key(request.snapshot),
                leader=request.caller.node,
                members=tuple(request.members),
                losses=request.losses,
            )
        except SnapshotError as error:
            return pb.ExchangeResponse(state=pb.ExchangeResponse.REFUSED, reason=str(error))
        return pb.ExchangeResponse(state=pb.ExchangeResponse.DONE if done else pb.ExchangeResponse.WORKING)

    def _admit(self, request: Any, caller: pb.Caller, context: grpc.ServicerContext) -> None:
        try:
            check_bounds(request)
        except BoundsError as error:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        if caller.run_id != self._run_id:
            context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"this is a guardian of run {self._run_id!r}, {caller.node!r} is of {caller.run_id!r}",
            )
        if caller.generation < self._exchanges.generation:
            context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"generation {caller.generation} of {caller.node!r} has ended; this is {self._exchanges.generation}",
            )


def _ref(request: pb.ReadRequest) -> Ref | None:
    key = _key(request.snapshot)
    match request.WhichOneof("what"):
        case "data":
            return Ref(key, Kind.DATA)
        case "manifest_of":
            return Ref(key, Kind.MANIFEST, node=request.manifest_of)
        case "parity":
            return Ref(key, Kind.PARITY, stripe=request.parity)
        case "sums":
            return Ref(key, Kind.SUMS, stripe=request.sums)
        case "layout":
            return Ref(key, Kind.LAYOUT)
        case _:
            return None


def _key(message: pb.SnapshotKey) -> Key:
    return Key(message.generation, message.step)


def _key_message(key: Key) -> pb.SnapshotKey:
    return pb.SnapshotKey(step=key.step, generation=key.generation)


# ------ calling


class PeerClient:
    """Another node's guardian, as a source. May be used by several threads."""

    def __init__(
        self,
        node: str,
        address: str,
        caller: Caller,
        *,
        metadata: tuple[tuple[str, str], ...],
        tls: Tls | None = None,
    ) -> None:
        self.node = node
        self.address = address
        self._caller = caller
        self._metadata = metadata
        self._channel = open_channel(address, tls, _OPTIONS)
        self._stub = rpc.GuardianStub(self._channel)
        self._closed = threading.Event()

    def close(self) -> None:
        self._closed.set()
        self._channel.close()

    def describe(self, *, num_tries: int = _NUM_TRIES) -> Description:
        """What it holds.

        Raises:
            SnapshotError: it cannot be reached, or refuses.
        """
        request = pb.DescribeRequest(caller=self._caller.message())
        found = self._call(lambda: self._stub.Describe(request, timeout=_CALL_S, metadata=self._metadata), num_tries)
        parity = tuple(
            Stored(_key(each.snapshot), tuple(each.members), each.losses, each.complete) for each in found.parity
        )
        return Description(found.generation, frozenset(_key(each) for each in found.snapshots), parity)

    def advance(self, phase: pb.ExchangeRequest.Phase, key: Key, *, members: tuple[str, ...], losses: int) -> bool:
        """Ask it for a phase of an exchange; whether that is done.

        Raises:
            RefusalError: it cannot take part.
            SnapshotError: it cannot be reached.
        """
        request = pb.ExchangeRequest(
            caller=self._caller.message(), snapshot=_key_message(key), phase=phase, members=members, losses=losses
        )
        answer = self._call(lambda: self._stub.Exchange(request, timeout=_CALL_S, metadata=self._metadata))
        if answer.state == pb.ExchangeResponse.REFUSED:
            raise RefusalError(answer.reason)
        return bool(answer.state == pb.ExchangeResponse.DONE)

    def read(self, ref: Ref, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """See `Source`. What was read stays read when the peer is away for a moment."""
        num_failures = 0
        while end is None or start < end:
            stop = 0 if end is None else min(start + _WINDOW_BYTES, end)
            try:
                for block in self._window(ref, start, stop):
                    start, num_failures = start + len(block), 0
                    yield block
                if end is None:
                    return
            except _DamagedError:
                num_failures += 1
                if num_failures == _NUM_TRIES:
                    raise SnapshotError(f"{self.node}: {ref}: the piece at {start} arrives damaged") from None
            except grpc.RpcError as error:
                num_failures += 1
                self._pause_or_raise(error, num_failures, _NUM_TRIES)
            except ValueError:
                raise self._let_go() from None

    def _window(self, ref: Ref, start: int, end: int) -> Iterator[bytes]:
        call = self._stub.Read(self._request(ref, start, end), timeout=_WINDOW_S, metadata=self._metadata)
        try:
            for chunk in call:
                if chunk.offset != start or not 0 < len(chunk.content) <= BLOCK_BYTES:
                    raise SnapshotError(f"{self.node}: {ref}: a piece of {len(chunk.content)} bytes at {chunk.offset}")
                if xxhash.xxh3_64_intdigest(chunk.content) != chunk.digest:
                    raise _DamagedError
                start += len(chunk.content)
                yield chunk.content
        finally:
            call.cancel()
        if end and start != end:
            raise SnapshotError(f"{self.node}: {ref}: ends at {start} bytes, not {end}")

    def _request(self, ref: Ref, start: int, end: int) -> pb.ReadRequest:
        request = pb.ReadRequest(caller=self._caller.message(), snapshot=_key_message(ref.key), start=start, end=end)
        match ref.kind:
            case Kind.DATA:
                request.data = True
            case Kind.MANIFEST:
                request.manifest_of = ref.node
            case Kind.PARITY:
                request.parity = ref.stripe
            case Kind.SUMS:
                request.sums = ref.stripe
            case Kind.LAYOUT:
                request.layout = True
        return request

    def _call(self, call: Callable[[], T], num_tries: int = _NUM_TRIES) -> T:
        num_failures = 0
        while True:
            try:
                return call()
            except grpc.RpcError as error:
                num_failures += 1
                self._pause_or_raise(error, num_failures, num_tries)
            except ValueError:
                raise self._let_go() from None

    def _let_go(self) -> SnapshotError:
        """gRPC raises ValueError where the channel was closed: another thread went on to the next generation."""
        assert self._closed.is_set(), "a call that is wrong"
        return SnapshotError(f"guardian of {self.node} at {self.address}: nobody asks it any more")

    def _pause_or_raise(self, error: grpc.RpcError, num_failures: int, num_tries: int) -> None:
        code = error.code()
        if code in _LOST and num_failures < num_tries and not self._closed.is_set():
            self._closed.wait(_BACKOFF_S[min(num_failures, len(_BACKOFF_S)) - 1])
            return
        raise SnapshotError(f"guardian of {self.node} at {self.address}: {error.details()} ({code.name})") from None


class Pace:
    """Bounds how many bytes a second are taken. For one thread."""

    def __init__(self, bytes_per_s: float, wait: Callable[[float], object], *, clock: Clock | None = None) -> None:
        self._bytes_per_s = bytes_per_s
        self._wait = wait
        self._clock = clock or SystemClock()
        self._free_at = self._clock.monotonic()

    def take(self, num_bytes: int) -> None:
        """Wait until so many more bytes may be taken."""
        now = self._clock.monotonic()
        if self._free_at > now:
            self._wait(self._free_at - now)
        self._free_at = max(now, self._free_at) + num_bytes / self._bytes_per_s
