"""Channels and ports with certificates on both sides (mTLS), or without any: gRPC credentials are made only here.

Both sides show a certificate that the same authority signed; who has none is turned away before a message is read. No
key is ever kept in a message, a variable or a log: only the paths of files travel.
"""

from __future__ import annotations

import dataclasses
import ssl
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc

from resilience.errors import UsageError

if TYPE_CHECKING:
    import grpc.aio

    from resilience.config import CoordinatorConfig

__all__ = ["Tls", "add_port", "open_channel", "refuse_readable"]

_VARIABLES = "RESILIENCE_COORDINATOR__TLS_"
_OTHERS = 0o007
_GROUP = 0o070


@dataclasses.dataclass(frozen=True, slots=True)
class Tls:
    """Files in PEM with which this process shows who it is, and knows the others."""

    ca: Path
    cert: Path
    key: Path
    name: str | None = None
    """Name that the other side's certificate must carry; None: the host under which it was dialled."""

    @classmethod
    def of(cls, config: CoordinatorConfig) -> Tls | None:
        """What the configuration names; None where it names nothing."""
        if config.tls_ca is None or config.tls_cert is None or config.tls_key is None:
            return None
        return cls(config.tls_ca, config.tls_cert, config.tls_key, config.tls_name)

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> Tls | None:
        """What `RESILIENCE_COORDINATOR__TLS_CA` and its like name, for who has no other configuration.

        Raises:
            ConfigError: one of them is missing.
        """
        found = {name: path for name, path in environ.items() if name.startswith(_VARIABLES)}
        if not found:
            return None
        from resilience.config import load_config  # pydantic takes as long to import as gRPC

        return cls.of(load_config(environ=found).coordinator)

    @classmethod
    def from_told(cls, told: Any) -> Tls | None:
        """What `told` gave, as `coordinator.json` has it.

        Raises:
            KeyError, TypeError: it is something else.
        """
        if told is None:
            return None
        return cls(Path(told["ca"]), Path(told["cert"]), Path(told["key"]), told["name"])

    def told(self) -> dict[str, str | None]:
        """The paths, as `coordinator.json` has them."""
        return {"ca": str(self.ca), "cert": str(self.cert), "key": str(self.key), "name": self.name}

    def read(self) -> tuple[bytes, bytes, bytes]:
        """Authority, certificate and key.

        Raises:
            UsageError: one cannot be read, others can read the key, or they do not fit each other.
        """
        refuse_readable(self.key, "coordinator.tls_key")
        try:
            # gRPC reports a bad file in its own log, and then only that a port cannot be used.
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_verify_locations(self.ca)
            context.load_cert_chain(self.cert, self.key)
            return self.ca.read_bytes(), self.cert.read_bytes(), self.key.read_bytes()
        except OSError as error:  # ssl.SSLError is one
            why = error.strerror or str(error)
            raise UsageError(
                f"coordinator.tls_ca = {self.ca}, tls_cert = {self.cert}, tls_key = {self.key}: cannot be used ({why});"
                " give an authority, a certificate that it signed, and that certificate's key, in PEM"
            ) from None


def refuse_readable(path: Path, what: str) -> None:
    """Refuse a secret that others can read.

    Its group may, where root owns the file: so Kubernetes and systemd hand secrets to a process that is not root.

    Raises:
        UsageError: it cannot be found, or others can read it.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise UsageError(f"{what} {path} cannot be read ({error.strerror}); give a file of mode 0600") from None
    mode = status.st_mode & 0o777
    if mode & _OTHERS or (mode & _GROUP and (status.st_uid != 0 or mode & 0o030)):
        raise UsageError(f"{what} {path} has mode {mode:04o}, others can read it; chmod 600 {path}")


def open_channel(address: str, tls: Tls | None, options: Sequence[tuple[str, Any]]) -> grpc.Channel:
    """A channel to `address`, lazily connected.

    Raises:
        UsageError: the certificates cannot be used.
    """
    if tls is None:
        return grpc.insecure_channel(address, options=options)
    ca, cert, key = tls.read()
    named = () if tls.name is None else (("grpc.ssl_target_name_override", tls.name),)
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(ca, key, cert), options=(*options, *named))


def add_port(server: grpc.Server | grpc.aio.Server, address: str, tls: Tls | None) -> int:
    """Let `server` listen on `address`; the port.

    Raises:
        UsageError: the certificates cannot be used.
        RuntimeError: the address cannot be listened on.
    """
    if tls is None:
        return int(server.add_insecure_port(address))
    ca, cert, key = tls.read()
    credentials = grpc.ssl_server_credentials([(key, cert)], root_certificates=ca, require_client_auth=True)
    return int(server.add_secure_port(address, credentials))
