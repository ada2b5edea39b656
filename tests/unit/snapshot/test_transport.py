"""Guardians on loopback: who is refused, what is taken up again, and what is found damaged."""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from resilience.errors import SnapshotError
from resilience.rpc.codec import MAX_MESSAGE_BYTES
from resilience.rpc.v1 import guardian_pb2 as pb
from resilience.rpc.v1 import guardian_pb2_grpc as rpc
from resilience.snapshot import transport
from resilience.snapshot.holdings import Kind, Ref, read_all
from resilience.snapshot.kept import Key
from resilience.snapshot.transport import Caller, Pace, PeerClient, RefusalError, own_host
from resilience.snapshot.volume import BLOCK_BYTES
from resilience.testing import FakeClock
from tests.nodes import TOKEN, Node, run_context

KEY = Key(1, 3)
DATA = Ref(KEY, Kind.DATA)
METADATA = (("authorization", f"Bearer {TOKEN}"),)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    node = Node(tmp_path, "worker-0", run_context(tmp_path), ranks=[0])
    node.start()
    node.take(3, sizes=[2 * BLOCK_BYTES + 5, 7], world_size=1)
    yield node
    node.lose()


def client_of(
    address: str, *, run_id: str = "run", generation: int = 1, metadata: tuple[tuple[str, str], ...] = METADATA
) -> PeerClient:
    return PeerClient("worker-0", address, Caller(run_id, "worker-1", lambda: generation), metadata=metadata)


def test_a_volume_is_read_in_pieces_and_ranges(node: Node) -> None:
    client = client_of(node.address)
    expected = b"".join(node.contents(3, 0).values())
    blocks = list(client.read(DATA))
    assert b"".join(blocks) == expected
    assert [len(block) for block in blocks][:-1] == [BLOCK_BYTES] * (len(expected) // BLOCK_BYTES)
    assert b"".join(client.read(DATA, 10, BLOCK_BYTES + 20)) == expected[10 : BLOCK_BYTES + 20]
    client.close()


def test_a_full_piece_fits_into_a_message() -> None:
    chunk = pb.Chunk(offset=(1 << 64) - 1, content=bytes(BLOCK_BYTES), digest=(1 << 64) - 1)
    assert chunk.ByteSize() < MAX_MESSAGE_BYTES - (16 << 10)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"metadata": ()}, "no token"),
        ({"metadata": (("authorization", "Bearer of another token"),)}, "wrong token"),
        ({"run_id": "other"}, "this is a guardian of run 'run', 'worker-1' is of 'other'"),
    ],
)
def test_others_are_refused(node: Node, options: dict[str, str], reason: str) -> None:
    client = client_of(node.address, **options)  # type: ignore[arg-type]
    for call in (
        lambda: client.describe(),
        lambda: list(client.read(DATA)),
        lambda: client.advance(pb.ExchangeRequest.HOLD, KEY, members=("worker-1", "worker-0"), losses=1),
    ):
        with pytest.raises(SnapshotError, match=reason):
            call()
    client.close()


def test_a_generation_that_has_ended_is_refused(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node.redundancy, "_generation", 2)
    client = client_of(node.address, generation=1)
    with pytest.raises(SnapshotError, match="generation 1 of 'worker-1' has ended; this is 2"):
        client.describe()
    client.close()


def test_an_exchange_is_refused_by_a_node_of_no_such_group(node: Node) -> None:
    client = client_of(node.address, generation=0)
    with pytest.raises(RefusalError, match="worker-1 leads no such group"):
        client.advance(pb.ExchangeRequest.HOLD, KEY, members=("worker-1", "worker-0"), losses=1)
    client.close()


def test_what_is_not_there_is_said(node: Node) -> None:
    client = client_of(node.address)
    for ref, reason in (
        (Ref(Key(1, 4), Kind.DATA), "the snapshot of step 4, generation 1 is not here"),
        (Ref(KEY, Kind.PARITY), "keeps no parity of the snapshot of step 3"),
        (Ref(KEY, Kind.MANIFEST, node="../../etc/passwd"), "keeps no parity"),
    ):
        with pytest.raises(SnapshotError, match=reason):
            read_all(client, ref)
    with pytest.raises(SnapshotError, match="of a volume of"):
        list(client.read(DATA, 0, 1 << 40))
    client.close()


def test_nothing_is_read_of_a_slot_that_is_being_overwritten(node: Node) -> None:
    client = client_of(node.address)
    stream = client.read(DATA)
    next(stream)
    node.arena.commit(0, 0).unlink()
    with pytest.raises(SnapshotError, match=r"not here|has begun to overwrite it"):
        list(client.read(DATA))
    client.close()


class _Broken(rpc.GuardianServicer):
    """Gives `content` in small pieces, and breaks or damages some of them."""

    def __init__(self, content: bytes, *, num_breaks: int, num_damaged: int) -> None:
        self.content = content
        self.num_breaks = num_breaks
        self.num_damaged = num_damaged
        self.starts: list[int] = []

    def Read(self, request: pb.ReadRequest, context: grpc.ServicerContext) -> Iterator[pb.Chunk]:
        self.starts.append(request.start)
        for number, start in enumerate(range(request.start, request.end or len(self.content), 1000)):
            if number == 2 and self.num_breaks:
                self.num_breaks -= 1
                context.abort(grpc.StatusCode.UNAVAILABLE, "gone for a moment")
            piece = self.content[start : min(start + 1000, request.end or len(self.content))]
            digest = transport.xxhash.xxh3_64_intdigest(piece)
            if number == 1 and self.num_damaged:
                self.num_damaged -= 1
                piece = piece[:-1] + bytes([piece[-1] ^ 1])
            yield pb.Chunk(offset=start, content=piece, digest=digest)


def served(servicer: rpc.GuardianServicer) -> tuple[grpc.Server, str]:
    server = grpc.server(ThreadPoolExecutor(4))
    rpc.add_GuardianServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    return server, f"127.0.0.1:{port}"


def test_a_stream_that_breaks_is_taken_up_where_it_broke() -> None:
    content = random.Random(1).randbytes(9_500)
    broken = _Broken(content, num_breaks=3, num_damaged=2)
    server, address = served(broken)
    client = client_of(address)
    assert b"".join(client.read(DATA, 0, len(content))) == content
    assert broken.starts == sorted(broken.starts)
    assert len(broken.starts) > 2
    assert broken.starts[-1] > 0, "what had arrived is not asked for again"
    client.close()
    server.stop(None)


def test_a_peer_that_damages_everything_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    server, address = served(_Broken(bytes(5000), num_breaks=0, num_damaged=1000))
    client = client_of(address)
    monkeypatch.setattr(transport, "_NUM_TRIES", 1)
    with pytest.raises(SnapshotError, match="the piece at 1000 arrives damaged"):
        list(client.read(DATA, 0, 5000))
    client.close()
    server.stop(None)


def test_a_peer_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "_NUM_TRIES", 2)
    client = client_of("127.0.0.1:1")
    with pytest.raises(SnapshotError, match=r"guardian of worker-0 at 127\.0\.0\.1:1: .*UNAVAILABLE"):
        client.describe(num_tries=2)
    client.close()


def test_a_run_without_a_token_stays_on_this_machine(node: Node) -> None:
    server = transport.Server(node.redundancy._holdings, node.redundancy, run_id="run", token=None)
    with pytest.raises(SnapshotError, match=r"open to other machines at 192\.0\.2\.1 and the run has no token"):
        server.start("192.0.2.1")
    server.stop()


def test_the_address_is_the_one_that_reaches_the_coordinator() -> None:
    assert own_host("127.0.0.1:29400") == "127.0.0.1"
    assert own_host("[::1]:29400") in ("::1", "127.0.0.1")
    assert own_host("no.such.host.invalid:1") == "127.0.0.1"


def test_pace_bounds_bytes_a_second() -> None:
    clock = FakeClock()
    waited: list[float] = []

    def wait(seconds: float) -> None:
        waited.append(seconds)
        clock.advance(seconds)

    pace = Pace(1000.0, wait, clock=clock)
    for _ in range(4):
        pace.take(500)
    assert waited == pytest.approx([0.5, 0.5, 0.5])
