"""Certificates on both sides: who has none, or one of another authority, is turned away; keys that others read too."""

from __future__ import annotations

import concurrent.futures
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import grpc
import pytest

from resilience.config import CoordinatorConfig, load_config
from resilience.coordinator.access import check_bind, read_token
from resilience.errors import ConfigError, SnapshotError, UsageError
from resilience.rpc.tls import Tls, add_port, open_channel
from resilience.snapshot.holdings import Description
from resilience.snapshot.transport import Caller, PeerClient, Server

MAKE = Path(__file__).parents[3] / "deploy" / "make-certificates"
ANSWER_S = 10.0

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificates")


def make(directory: Path, name: str, *hosts: str) -> Tls:
    subprocess.run([MAKE, directory, name, *hosts], check=True, capture_output=True, timeout=60)
    return Tls(directory / "ca.crt", directory / f"{name}.crt", directory / f"{name}.key")


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tls]:
    ours, theirs = tmp_path_factory.mktemp("ours"), tmp_path_factory.mktemp("theirs")
    return {
        "coordinator": make(ours, "coordinator", "127.0.0.1"),
        "elsewhere": make(ours, "elsewhere", "192.0.2.7"),
        "node": make(ours, "node"),
        "stranger": make(theirs, "node"),
    }


@pytest.fixture
def server() -> Iterator[grpc.Server]:
    server = grpc.server(concurrent.futures.ThreadPoolExecutor(2))
    yield server
    server.stop(0).wait(ANSWER_S)


def ask(port: int, tls: Tls | None) -> grpc.StatusCode:
    """What a call to a method that is not there ends with: UNIMPLEMENTED once somebody let it in."""
    with open_channel(f"127.0.0.1:{port}", tls, ()) as channel:
        try:
            channel.unary_unary("/nothing/Here")(b"", timeout=ANSWER_S)
        except grpc.RpcError as error:
            return error.code()
    raise AssertionError("a method that is not there answered")


def test_who_shows_a_certificate_of_the_authority_is_let_in(server: grpc.Server, certificates: dict[str, Tls]) -> None:
    port = add_port(server, "127.0.0.1:0", certificates["coordinator"])
    server.start()
    assert ask(port, certificates["node"]) is grpc.StatusCode.UNIMPLEMENTED
    ours = certificates["node"]
    only_the_authority = Tls(ours.ca, certificates["stranger"].cert, certificates["stranger"].key)
    for turned_away in (None, certificates["stranger"], only_the_authority):
        assert ask(port, turned_away) is grpc.StatusCode.UNAVAILABLE


def test_a_certificate_for_another_host_serves_only_under_the_name_in_it(
    server: grpc.Server, certificates: dict[str, Tls]
) -> None:
    port = add_port(server, "127.0.0.1:0", certificates["elsewhere"])
    server.start()
    ours = certificates["node"]
    assert ask(port, ours) is grpc.StatusCode.UNAVAILABLE
    assert ask(port, Tls(ours.ca, ours.cert, ours.key, "elsewhere")) is grpc.StatusCode.UNIMPLEMENTED
    assert ask(port, Tls(ours.ca, ours.cert, ours.key, "coordinator")) is grpc.StatusCode.UNAVAILABLE


class _Empty:
    """A node that holds nothing yet, as holdings and as exchanges."""

    generation = 1

    def describe(self, generation: int) -> Description:
        return Description(generation, frozenset(), ())


def test_guardians_of_other_machines_show_each_other_certificates(certificates: dict[str, Tls]) -> None:
    caller = Caller("r1", "a", lambda: 1)
    server = Server(cast(Any, _Empty()), cast(Any, _Empty()), run_id="r1", token=None, tls=certificates["coordinator"])
    address = server.start("127.0.0.1")

    def described(tls: Tls | None) -> int:
        client = PeerClient("b", address, caller, metadata=(), tls=tls)
        try:
            return client.describe(num_tries=1).generation
        finally:
            client.close()

    assert described(certificates["node"]) == 1
    for turned_away in (None, certificates["stranger"]):
        with pytest.raises(SnapshotError):
            described(turned_away)
    server.stop()


def test_files_that_cannot_be_used_are_named_with_the_reason(tmp_path: Path, certificates: dict[str, Tls]) -> None:
    good = certificates["node"]
    with pytest.raises(UsageError, match=r"tls_key .*gone cannot be read \(No such file or directory\)"):
        Tls(good.ca, good.cert, tmp_path / "gone").read()
    with pytest.raises(UsageError, match=r"tls_cert = .*gone.*cannot be used \(No such file or directory\)"):
        Tls(good.ca, tmp_path / "gone", good.key).read()
    with pytest.raises(UsageError, match=r"cannot be used \(.*KEY_VALUES_MISMATCH"):
        Tls(good.ca, good.cert, certificates["elsewhere"].key).read()
    open_key = tmp_path / "key"
    open_key.write_bytes(good.key.read_bytes())
    open_key.chmod(0o644)
    with pytest.raises(UsageError, match=r"key has mode 0644, others can read it; chmod 600"):
        Tls(good.ca, good.cert, open_key).read()


@pytest.mark.parametrize(
    ("mode", "of_root", "others"), [(0o440, False, True), (0o460, True, True), (0o440, True, False)]
)
def test_a_secret_that_root_hands_to_a_group_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int, of_root: bool, others: bool
) -> None:
    token = tmp_path / "token"
    token.write_text("a-token-of-enough-characters")
    token.chmod(mode)
    found = token.stat()
    fields = [*found]
    fields[4] = 0 if of_root else 1000
    monkeypatch.setattr(Path, "stat", lambda self: type(found)(fields))
    if others:
        with pytest.raises(UsageError, match="others can read it"):
            read_token(token)
    else:
        assert read_token(token) == "a-token-of-enough-characters"


def test_certificates_open_an_address_to_others_as_a_token_does(certificates: dict[str, Tls]) -> None:
    check_bind("0.0.0.0", None, certificates["node"])
    with pytest.raises(UsageError, match=r"token_file or coordinator\.tls_ca"):
        check_bind("0.0.0.0", None, None)


def test_the_configuration_names_all_three_files_or_none() -> None:
    files = {"tls_ca": "ca", "tls_cert": "cert", "tls_key": "key"}
    assert Tls.of(CoordinatorConfig.model_validate({**files, "tls_name": "n"})) == Tls(
        Path("ca"), Path("cert"), Path("key"), "n"
    )
    assert Tls.of(CoordinatorConfig()) is None
    for missing in files:
        given = {name: path for name, path in files.items() if name != missing}
        with pytest.raises(ConfigError, match=rf"coordinator\.{missing} missing: mTLS needs"):
            load_config(overrides={"coordinator": given})
    with pytest.raises(ConfigError, match=r"tls_ca and coordinator\.tls_cert and coordinator\.tls_key missing"):
        load_config(overrides={"coordinator": {"tls_name": "n"}})


def test_who_has_no_configuration_names_them_in_the_environment() -> None:
    prefix = "RESILIENCE_COORDINATOR__TLS_"
    found = Tls.from_environment({f"{prefix}CA": "a", f"{prefix}CERT": "b", f"{prefix}KEY": "c", "HOME": "/"})
    assert found == Tls(Path("a"), Path("b"), Path("c"))
    assert Tls.from_told(found.told()) == found
    assert Tls.from_environment({"HOME": "/", "RESILIENCE_COORDINATOR__PORT": "7"}) is None
