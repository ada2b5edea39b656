"""Several nodes in one process: parity exchanged over loopback, nodes lost, their files rebuilt byte for byte."""

from __future__ import annotations

import errno
import gc
import itertools
from pathlib import Path

import pytest

from resilience.errors import SnapshotError
from resilience.snapshot import holds as holds_module
from resilience.snapshot.holdings import Holdings, Kind, Ref
from resilience.snapshot.holds import Holds, read_holds
from resilience.snapshot.kept import Kept, Key
from resilience.snapshot.manifest import Hold
from resilience.snapshot.prepare import SNAPSHOT, prepare
from resilience.snapshot.volume import BLOCK_BYTES
from tests.nodes import Cluster, Node, cluster, eventually

SMALL = [[3000, 1, 50_000], [70_001], [0, 12]]
"""Bytes of each file: nodes need not have equally much."""
LARGE = [[2 * BLOCK_BYTES + 17, 5000], [BLOCK_BYTES + 1]]


def rebuilt(nodes: Cluster, lost: list[Node], step: int) -> None:
    """Each lost node's files are had by a fresh node from those that are left, equal byte for byte."""
    expected = {rank: node.contents(step, rank) for node in lost for rank in node.ranks}
    present = [node for node in nodes.nodes if node not in lost]
    for node in lost:
        node.lose()
    for node in lost:
        spare = Node(nodes.tmp_path, f"spare-for-{node.name}", nodes.context, ranks=node.ranks)
        spare.start()
        try:
            check_restored(nodes, spare, present, step, expected)
        finally:
            spare.lose()


def check_restored(
    nodes: Cluster, spare: Node, present: list[Node], step: int, expected: dict[int, dict[str, bytes]]
) -> None:
    order = nodes.order(spare, step, present=present)
    remote = spare.redundancy.remote(order)
    assert remote is not None
    try:
        folder = prepare(spare.arena, order, run_id="run", node=spare.name, remote=remote)
    finally:
        remote.close()
    assert (folder / SNAPSHOT).exists()
    for rank in spare.ranks:
        for path, content in expected[rank].items():
            here = folder / (f"trail-{rank}.bin" if path == "trail" else path.replace("state/", f"global_step{step}/"))
            assert here.read_bytes() == content, (rank, path)


@pytest.mark.parametrize("sizes", [SMALL, LARGE])
def test_either_of_two_nodes_can_be_lost(tmp_path: Path, sizes: list[list[int]]) -> None:
    for lost in range(2):
        with cluster(tmp_path, 2, ranks_each=2) as nodes:
            nodes.take(3, sizes)
            nodes.protect(3)
            members = ("worker-0", "worker-1")
            assert all(node.inventory() == {3: (members, 1)} for node in nodes.nodes)
            rebuilt(nodes, [nodes.nodes[lost]], 3)


@pytest.mark.parametrize("lost", list(itertools.combinations(range(6), 2))[::4])
def test_any_two_of_six_can_be_lost(tmp_path: Path, lost: tuple[int, int]) -> None:
    with cluster(tmp_path, 6, parity_losses=2) as nodes:
        nodes.take(1, SMALL)
        nodes.protect(1)
        rebuilt(nodes, [nodes.nodes[i] for i in lost], 1)


def test_three_nodes_share_one_parity(tmp_path: Path) -> None:
    with cluster(tmp_path, 3) as nodes:
        nodes.take(1, LARGE)
        nodes.protect(1)
        fact = nodes.nodes[0].facts[-1]
        assert (fact.tier, fact.redundancy) == ("peer", 1)
        largest = max(node.manifests[1].num_bytes for node in nodes.nodes)
        assert largest / 2 <= fact.num_bytes <= largest / 2 + 200
        rebuilt(nodes, [nodes.nodes[1]], 1)


def test_only_the_newest_parity_is_kept_and_held(tmp_path: Path) -> None:
    with cluster(tmp_path, 2) as nodes:
        for step in (1, 2):
            nodes.take(step, SMALL)
            nodes.protect(step)
        for node in nodes.nodes:
            eventually(lambda node=node: node.inventory()[1] == ((), 0), "the older parity to go")  # type: ignore[misc]
            assert node.inventory()[2][1] == 1
            assert {hold.step for hold in read_holds(node.arena)} == {2}


def test_what_a_member_lacks_is_passed_over(tmp_path: Path) -> None:
    with cluster(tmp_path, 2) as nodes:
        nodes.take(1, SMALL)
        nodes.nodes[0].take(2, sizes=[5], world_size=2)
        nodes.protect(1)
        nodes.take(3, SMALL)
        nodes.protect(3)
        assert all(2 not in node.protected() for node in nodes.nodes)


def test_a_snapshot_that_is_taken_again_is_protected_again(tmp_path: Path) -> None:
    """After a rewind the same step comes once more: parity of what it was before is worth nothing."""
    with cluster(tmp_path, 2) as nodes:
        nodes.take(1, SMALL)
        nodes.protect(1)
        for node in nodes.nodes:
            node.arena.manifest(1, 1).unlink()
            node.facts.clear()
        nodes.take(1, SMALL, sequence=2)
        assert all(node.inventory()[1] == ((), 0) or 1 in node.protected() for node in nodes.nodes)
        nodes.protect(1)
        rebuilt(nodes, [nodes.nodes[0]], 1)


def test_a_snapshot_that_is_overwritten_meanwhile_is_given_up(tmp_path: Path) -> None:
    with cluster(tmp_path, 2) as nodes:
        nodes.take(1, SMALL)
        nodes.protect(1)
        nodes.take(2, SMALL)
        overwritten = nodes.nodes[1].manifests[2].part(1).commit.slot
        nodes.nodes[1].arena.commit(1, overwritten).unlink()
        nodes.take(3, SMALL)
        nodes.protect(3)
        rebuilt(nodes, [nodes.nodes[1]], 3)


def test_a_guardian_that_is_started_again_goes_on(tmp_path: Path) -> None:
    with cluster(tmp_path, 2) as nodes:
        nodes.take(1, SMALL)
        nodes.protect(1)
        for step, node in enumerate(nodes.nodes, start=1):
            before = node.address
            node.start_again()
            assert node.address == before, "peers know no other address"
            assert {hold.step for hold in read_holds(node.arena)} == {step}
            nodes.take(step + 1, SMALL)
            nodes.protect(step + 1)
        rebuilt(nodes, [nodes.nodes[0]], 3)


def test_a_damaged_block_is_made_up_for(tmp_path: Path) -> None:
    """Two losses: one is a node, the other a flipped byte, in another block of each of two members."""
    with cluster(tmp_path, 4, parity_losses=2) as nodes:
        nodes.take(1, [[6 * BLOCK_BYTES + 99]])
        nodes.protect(1)
        for member, offset in ((1, 100), (2, BLOCK_BYTES + 100)):
            rank = nodes.nodes[member].ranks[0]
            commit = nodes.nodes[member].manifests[1].part(rank).commit
            flip(nodes.nodes[member].arena.slot(rank, commit.slot) / commit.files[0].path, offset)
        flip(next(nodes.nodes[3].arena.peers.glob("1-g1/*.parity")), 3)
        rebuilt(nodes, [nodes.nodes[0]], 1)


def test_damage_on_a_node_that_lives_is_made_up_for_by_the_others(tmp_path: Path) -> None:
    with cluster(tmp_path, 2) as nodes:
        nodes.take(1, SMALL)
        nodes.protect(1)
        node = nodes.nodes[0]
        expected = {0: node.contents(1, 0)}
        commit = node.manifests[1].part(0).commit
        flip(node.arena.slot(0, commit.slot) / commit.files[2].path, 77)
        check_restored(nodes, node, [nodes.nodes[1]], 1, expected)


def test_damage_that_cannot_be_made_up_for_is_refused(tmp_path: Path) -> None:
    with cluster(tmp_path, 2) as nodes:
        nodes.take(1, SMALL)
        nodes.protect(1)
        flip(next(nodes.nodes[0].arena.peers.glob("1-g1/*.parity")), 3)
        with pytest.raises(SnapshotError, match=r"worker-1 cannot be rebuilt.*worker-0 is not what it was"):
            rebuilt(nodes, [nodes.nodes[1]], 1)


def test_one_node_more_than_parity_makes_up_for_is_refused(tmp_path: Path) -> None:
    with cluster(tmp_path, 3) as nodes:
        nodes.take(1, SMALL)
        nodes.protect(1)
        with pytest.raises(SnapshotError, match=r"2 other members are needed, 1 can be used \(worker-0\)"):
            rebuilt(nodes, nodes.nodes[1:], 1)


def test_a_parity_that_was_not_complete_is_not_used(tmp_path: Path) -> None:
    with cluster(tmp_path, 2) as nodes:
        nodes.take(1, SMALL)
        nodes.protect(1)
        (nodes.nodes[0].arena.peers / "1-g1" / "complete").unlink()
        with pytest.raises(SnapshotError, match="no manifest has rank 1's part"):
            rebuilt(nodes, [nodes.nodes[1]], 1)


@pytest.mark.parametrize("name", ["set.json", "manifest-0.json"])
def test_a_damaged_parity_set_does_not_count(tmp_path: Path, name: str) -> None:
    with cluster(tmp_path, 2) as nodes:
        nodes.take(1, SMALL)
        nodes.protect(1)
        for node in nodes.nodes:
            node.stop()  # a guardian that is at work would store it anew
        flip(nodes.nodes[0].arena.peers / "1-g1" / name, 30)
        assert nodes.nodes[0].inventory() == {1: ((), 0)}
        assert nodes.nodes[1].inventory() == {1: (("worker-0", "worker-1"), 1)}


def test_a_full_file_system_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from resilience.snapshot import encode
    from resilience.snapshot.arena import Room

    monkeypatch.setattr(encode, "room", lambda _: Room(free=10, available=10))
    with cluster(tmp_path, 2) as nodes:
        nodes.take(1, SMALL)
        told = []

        def said() -> bool:
            told.append(capfd.readouterr().err)
            return "set snapshot.parity_losses = 0" in "".join(told)

        eventually(said, "the reason")
        assert not nodes.nodes[0].protected()


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (Kept, "publish"),
        (Kept, "complete"),
        (Kept, "remove"),
        (Holds, "add"),
        (Holdings, "describe"),
    ],
)
def test_storage_that_fails_is_said_once_and_protects_nothing_until_it_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], owner: type, name: str
) -> None:
    """A full file system ends no thread, is not hammered at, and no node says that it protects what it does not."""
    with cluster(tmp_path, 2) as nodes:
        nodes.take(1, SMALL)
        nodes.protect(1)
        for node in nodes.nodes:
            node.facts.clear()
        tries: list[int] = []

        def full(*_: object, **__: object) -> None:
            tries.append(1)
            raise OSError(errno.ENOSPC, "No space left on device", "somewhere")

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, full)
            nodes.take(2, SMALL)
            leader = nodes.nodes[0].redundancy
            eventually(lambda: len(tries) >= 4 and leader._num_failures >= 3, "some tries")
            if name != "remove":  # by then both are protected
                assert not any(node.protected() for node in nodes.nodes)
                assert all(node.inventory()[1][1] == 1 for node in nodes.nodes), "the parity before still counts"
        nodes.protect(2)
        lines = [line for line in capfd.readouterr().err.splitlines() if "No space left" in line]
        assert lines
        assert len(lines) == len({line.split(":")[2] for line in lines}), "once for each node"
        rebuilt(nodes, [nodes.nodes[1]], 2)


def test_a_peer_that_is_let_go_while_it_is_asked_is_no_error_of_the_thread(tmp_path: Path) -> None:
    """A new generation closes the channels of the one before, whatever the leader is doing."""
    with cluster(tmp_path, 2) as nodes:
        nodes.take(1, SMALL)
        nodes.protect(1)
        (client,) = nodes.nodes[0].redundancy._clients.values()
        client.close()
        with pytest.raises(SnapshotError, match="nobody asks it any more"):
            client.describe()
        with pytest.raises(SnapshotError, match="nobody asks it any more"):
            list(client.read(Ref(Key(1, 1), Kind.DATA)))
        nodes.begin(2)
        nodes.take(2, SMALL)
        nodes.protect(2)


def test_manifests_that_go_while_they_are_listed_leave_nothing_open(tmp_path: Path) -> None:
    with cluster(tmp_path, 2) as nodes:
        node = nodes.nodes[0]
        for name in ("one", "other"):
            (node.arena.manifests / name).symlink_to("gone")
        assert node.redundancy._published() == []
        gc.collect()  # an open iterator would be told of here


def test_a_hold_that_could_not_be_written_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks read the file: what is only in the guardian's memory holds nobody back."""
    with cluster(tmp_path, 1) as nodes:
        holds = Holds(nodes.nodes[0].arena)
        hold = Hold(3, "why", 1)

        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(holds_module, "write_atomically", full)
            with pytest.raises(OSError, match="No space"):
                holds.add(hold)
        assert not holds.has("why")
        holds.add(hold)
        assert read_holds(nodes.nodes[0].arena) == (hold,)
        with monkeypatch.context() as patch:
            patch.setattr(holds_module, "write_atomically", full)
            with pytest.raises(OSError, match="No space"):
                holds.drop("why")
        assert holds.has("why"), "ranks go by the file, which still says so"


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 8]))
