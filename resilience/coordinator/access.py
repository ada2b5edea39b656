"""Who may call: the token, compared in constant time, what a bind address requires, and under which one to call."""

from __future__ import annotations

import contextlib
import hmac
import ipaddress
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc

from resilience.errors import UsageError
from resilience.rpc.tls import Tls, refuse_readable

if TYPE_CHECKING:
    _Interceptor = grpc.aio.ServerInterceptor[Any, Any]
else:
    _Interceptor = grpc.aio.ServerInterceptor

__all__ = ["TokenInterceptor", "check_bind", "dialled_host", "read_token"]

_OPEN_SERVICES = ("/grpc.health.v1.Health/",)
"""Probes carry no token and learn nothing but that somebody serves."""

MIN_TOKEN_CHARACTERS = 16

_EVERY_ADDRESS = frozenset({"0.0.0.0", "::", "[::]"})
_ELSEWHERE = "192.0.2.1"
"""Of TEST-NET-1 (RFC 5737), which belongs to nobody: stands for any other machine. Nothing is sent there."""


def read_token(path: Path | None) -> str | None:
    """The shared token, or None where there is none.

    Raises:
        UsageError: it cannot be read, others may read it, or it is too short.
    """
    if path is None:
        return None
    refuse_readable(path, "token file")
    try:
        token = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"token file {path} cannot be read ({error}); give one line of ASCII, mode 0600") from None
    if len(token) < MIN_TOKEN_CHARACTERS:
        raise UsageError(
            f"token file {path} holds {len(token)} characters; at least {MIN_TOKEN_CHARACTERS} are required"
        )
    return token


def check_bind(host: str, token: str | None, tls: Tls | None = None) -> None:
    """Refuse to be open to others without a token or certificates.

    Raises:
        UsageError: `host` is not a loopback address and there is neither.
    """
    if token is None and tls is None and not _is_loopback(host):
        raise UsageError(
            f"coordinator.bind = {host!r} is open to other machines and there is no token; set coordinator.token_file"
            " or coordinator.tls_ca, or bind to 127.0.0.1"
        )


def dialled_host(bind: str) -> str:
    """Under which host others reach a server that listens on `bind`: on every address means on this machine's own."""
    if bind not in _EVERY_ADDRESS:
        return bind
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((_ELSEWHERE, 9))
        return str(probe.getsockname()[0])
    return socket.gethostname()  # no route to anywhere


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class TokenInterceptor(_Interceptor):
    """Refuses calls without the token, before their messages are read."""

    def __init__(self, token: str) -> None:
        self._expected = f"Bearer {token}".encode()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None or handler_call_details.method.startswith(_OPEN_SERVICES):
            return handler
        given = dict(handler_call_details.invocation_metadata or ()).get("authorization", "")
        given_bytes = given if isinstance(given, bytes) else given.encode("utf-8", "replace")
        if hmac.compare_digest(given_bytes, self._expected):
            return handler
        if given:
            return _refusing(handler, grpc.StatusCode.PERMISSION_DENIED, "wrong token; use this run's token file")
        return _refusing(
            handler, grpc.StatusCode.UNAUTHENTICATED, "no token; send the metadata `authorization: Bearer <token>`"
        )


def _refusing(handler: Any, code: grpc.StatusCode, text: str) -> Any:
    """A handler of the same shape that only refuses."""

    async def refuse(_: Any, context: Any) -> None:
        await context.abort(code, text)

    if handler.request_streaming and handler.response_streaming:
        return grpc.stream_stream_rpc_method_handler(refuse)
    if handler.response_streaming:
        return grpc.unary_stream_rpc_method_handler(refuse)
    if handler.request_streaming:
        return grpc.stream_unary_rpc_method_handler(refuse)
    return grpc.unary_unary_rpc_method_handler(refuse)
