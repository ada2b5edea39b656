"""What a restore has from other nodes: files of ranks that ran elsewhere, and files of lost nodes, rebuilt from parity.

A file comes from the node that wrote it while that one holds it; else it is rebuilt from its parity group, block by
block, from as many members as are needed. Every block that goes into that is held against the digest that was taken
when the parity was computed; one that differs counts as lost, and another takes its place. Callers hold what they get
against the manifest of the node that wrote it, of which every member of its group has a copy.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import xxhash

from resilience.errors import SnapshotError
from resilience.snapshot.encode import segment_blocks
from resilience.snapshot.groups import Extent
from resilience.snapshot.hashing import verify_file
from resilience.snapshot.holdings import Description, Holdings, Kind, Ref, Source, read_all
from resilience.snapshot.kept import Key, ParitySet, Sums, parse_set, parse_sums
from resilience.snapshot.manifest import FileEntry, Manifest, Part, parse_manifest
from resilience.snapshot.orders import Source as Snapshot
from resilience.snapshot.parity import Code
from resilience.snapshot.transport import PeerClient
from resilience.snapshot.volume import BLOCK_BYTES, TRAIL, Piece, pieces_of, write_all

__all__ = ["Peers"]

_MAX_THREADS = 8


class _BadError(Exception):
    """A block of a stripe cannot be used."""

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(reason)
        self.index = index
        self.reason = reason


@dataclasses.dataclass(frozen=True)
class _Node:
    """A node's part of the snapshot, and who can give it."""

    manifest: Manifest
    pieces: list[Piece]
    owner: Source | None
    """The node itself, where it has it still."""
    group: _Group | None
    """Its parity group, where the exchange of this snapshot was complete."""


class Peers:
    """The other nodes, for one restore: implements `resilience.snapshot.prepare.Remote`. Used by several threads."""

    def __init__(self, own: Holdings, clients: Sequence[PeerClient], *, run_id: str, node: str) -> None:
        """Nothing is asked before `manifests`.

        Args:
            own: what this node holds.
            clients: the guardians of the others.
            run_id: the run.
            node: this node's name.
        """
        self._own = own
        self._clients = clients
        self._run_id = run_id
        self._node = node
        self._nodes: dict[int, _Node] = {}
        self._unreachable: list[str] = []

    def close(self) -> None:
        """Close the connections."""
        for client in self._clients:
            client.close()

    def manifests(self, source: Snapshot) -> list[Manifest]:
        """The manifests of this snapshot of all nodes that took part in it, as far as anybody has them.

        Raises:
            SnapshotError: nobody that can be reached has any part of it.
        """
        key = Key(source.generation, source.step)
        sources: dict[str, Source] = {self._node: self._own}
        found = {self._node: self._own.describe(0)}
        with concurrent.futures.ThreadPoolExecutor(_MAX_THREADS) as pool:
            for client, description in zip(self._clients, pool.map(self._describe, self._clients), strict=True):
                if description is not None:
                    sources[client.node], found[client.node] = client, description
        groups = self._groups(key, sources, found)
        manifests: dict[str, Manifest] = {}
        for name, description in found.items():
            if key in description.snapshots:
                with contextlib.suppress(SnapshotError):
                    manifests[name] = self._manifest(sources[name], key, name)
        owners = set(manifests)
        for group in groups:
            for lost in [node for node in group.set.members if node not in manifests]:
                manifests[lost] = group.manifest(lost)
        if not manifests:
            raise SnapshotError(f"no node has a part of the snapshot of {key}{self._told()}")
        for name, manifest in manifests.items():
            owner = sources[name] if name in owners else None
            group_of = next((group for group in groups if name in group.set.members), None)
            node = _Node(manifest, pieces_of(manifest), owner, group_of)
            self._nodes.update(dict.fromkeys(manifest.ranks, node))
        return list(manifests.values())

    def fetch(self, part: Part, entry: FileEntry, into: Path) -> None:
        """Write a file of a rank's part to `into`.

        Raises:
            SnapshotError: it cannot be had.
        """
        node, piece = self._piece(part, entry.path)
        problem = "its node does not hold it"
        if node.owner is not None:
            try:
                write_all(node.owner.read(Ref(_key(part), Kind.DATA), piece.start, piece.end), into)
                if node.group is not None:
                    verify_file(into, entry)  # while there is another way to have it
                return
            except SnapshotError as error:
                problem = str(error)
        self._rebuild(node, piece, into, problem)

    def fetch_trail(self, part: Part, into: Path) -> None:
        """Write the trail of a rank, as long as its commit says.

        Raises:
            SnapshotError: it cannot be had.
        """
        node, piece = self._piece(part, TRAIL)
        problem = "its node does not hold it"
        if node.owner is not None:
            try:
                write_all(node.owner.read(Ref(_key(part), Kind.DATA), piece.start, piece.end), into)
                return
            except SnapshotError as error:
                problem = str(error)
        self._rebuild(node, piece, into, problem)

    # ------

    def _describe(self, client: PeerClient) -> Description | None:
        try:
            return client.describe()
        except SnapshotError as error:
            self._unreachable.append(str(error))
            return None

    def _told(self) -> str:
        return "".join(f"; {reason}" for reason in self._unreachable)

    def _manifest(self, source: Source, key: Key, node: str) -> Manifest:
        content = read_all(source, Ref(key, Kind.MANIFEST, node=node))
        manifest = parse_manifest(content, source=f"manifest of {node}")
        if (manifest.run_id, manifest.step, manifest.generation) != (self._run_id, key.step, key.generation):
            raise SnapshotError(f"manifest of {node}: of another snapshot, or of run {manifest.run_id!r}")
        return manifest

    def _groups(self, key: Key, sources: dict[str, Source], found: dict[str, Description]) -> list[_Group]:
        """The parity groups whose exchange of this snapshot was complete on somebody: then all had stored it."""
        groups: dict[tuple[str, ...], _Group] = {}
        for name, description in found.items():
            stored = description.stored(key)
            if stored is None or not stored.complete or stored.members in groups:
                continue
            with contextlib.suppress(SnapshotError):
                content = read_all(sources[name], Ref(key, Kind.LAYOUT))
                parity_set = parse_set(content, source=f"layout of {name}")
                if parity_set.run_id == self._run_id and parity_set.key == key:
                    members = {place: sources[n] for place, n in enumerate(parity_set.members) if n in sources}
                    groups[stored.members] = _Group(parity_set, members)
        return list(groups.values())

    def _piece(self, part: Part, path: str) -> tuple[_Node, Piece]:
        node = self._nodes.get(part.commit.rank)
        for piece in () if node is None else node.pieces:
            if (piece.rank, piece.path) == (part.commit.rank, path):
                assert node is not None
                return node, piece
        raise SnapshotError(f"rank {part.commit.rank}: no node has {path or 'its trail'} of step {part.commit.step}")

    def _rebuild(self, node: _Node, piece: Piece, into: Path, problem: str) -> None:
        if node.group is None:
            raise SnapshotError(
                f"rank {piece.rank}'s {piece.path or 'trail'} cannot be had: {problem}, and no parity group of "
                f"{node.manifest.node} holds this snapshot{self._told()}"
            )
        write_all(node.group.rebuild(node.manifest.node, piece.start, piece.end), into)


def _key(part: Part) -> Key:
    return Key(part.commit.generation, part.commit.step)


class _Group:
    """A parity group, as far as its members can be reached."""

    def __init__(self, parity_set: ParitySet, members: dict[int, Source]) -> None:
        self.set = parity_set
        self._layout = parity_set.layout
        self._members = members
        self._sums: dict[tuple[int, int], Sums | None] = {}
        self._dead: dict[tuple[int, bool], str] = {}
        """(member, whether it is about its data) → why nothing can be read from it."""
        self._lock = threading.Lock()

    def manifest(self, node: str) -> Manifest:
        """The manifest of a member that is lost, from whoever has it.

        Raises:
            SnapshotError: nobody has.
        """
        problem = ""
        for source in self._members.values():
            try:
                content = read_all(source, Ref(self.set.key, Kind.MANIFEST, node=node))
                manifest = parse_manifest(content, source=f"copy of the manifest of {node}")
            except SnapshotError as error:
                problem = str(error)
                continue
            if (manifest.run_id, manifest.node, manifest.step) == (self.set.run_id, node, self.set.step):
                return manifest
        raise SnapshotError(f"no member of its parity group has the manifest of {node}: {problem}")

    def rebuild(self, node: str, start: int, end: int) -> Iterator[bytes]:
        """A range of the volume of a member, from what the others hold.

        Raises:
            SnapshotError: too few members can be reached, or too many blocks are damaged.
        """
        member = self.set.members.index(node)
        for extent in self._layout.extents(member, start, end):
            yield from self._extent(member, extent)

    def _extent(self, member: int, extent: Extent) -> Iterator[bytes]:
        block, last = extent.start // BLOCK_BYTES, -(-extent.end // BLOCK_BYTES)
        bad: dict[int, str] = {}
        while block < last:
            began = block
            try:
                # After a bad block only that one is made without its member: the next one may be good again.
                for content in self._blocks(member, extent.stripe, block, block + 1 if bad else last, bad):
                    base = block * BLOCK_BYTES
                    yield content[max(extent.start - base, 0) : extent.end - base]
                    block += 1
                bad = {}
            except _BadError as problem:
                bad = {**(bad if block == began else {}), problem.index: problem.reason}

    def _blocks(self, member: int, stripe: int, first: int, last: int, bad: dict[int, str]) -> Iterator[bytes]:
        """Blocks `first` to `last` of a member's segment, without the indices that are bad."""
        layout = self._layout
        sources, keepers = layout.sources(stripe), layout.keepers(stripe)
        places = [*sources, *keepers]
        code = Code(len(sources), layout.losses)
        wanted = sources.index(member)
        usable = [i for i, m in enumerate(places) if i != wanted and m in self._members and i not in bad]
        usable = [i for i in usable if (places[i], i < len(sources)) not in self._dead]
        # Without its sums a parity block cannot be told from a damaged one.
        usable = [i for i in usable if i < len(sources) or self._sums_of(stripe, places[i]) is not None]
        sums = next((s for keeper in keepers if (s := self._sums_of(stripe, keeper)) is not None), None)
        if sums is None or len(usable) < len(sources):
            have = [self.set.members[places[i]] for i in usable]
            raise SnapshotError(
                f"snapshot of {self.set.key}: {self.set.members[member]} cannot be rebuilt: {len(sources)} other "
                f"members are needed, {len(have)} can be used ({', '.join(have)})"
                + "".join(f"; {reason}" for reason in dict.fromkeys([*bad.values(), *self._dead.values()]))
            )
        chosen = usable[: len(sources)]
        streams = {i: self._stream(i, stripe, places[i], first, is_data=i < len(sources)) for i in chosen}
        for block in range(first, last):
            blocks = {}
            for i, stream in streams.items():
                expected = sums[block, i] if i < len(sources) else self._parity_sum(stripe, places[i], block)
                blocks[i] = self._next(stream, i, places[i], int(expected), is_data=i < len(sources))
            content = code.rebuild(blocks, wanted)
            if xxhash.xxh3_64_intdigest(content) != int(sums[block, wanted]):
                raise SnapshotError(f"snapshot of {self.set.key}: block {block} of stripe {stripe} is rebuilt wrong")
            yield content

    def _stream(self, index: int, stripe: int, member: int, first: int, *, is_data: bool) -> Iterator[bytes]:
        source, key, layout = self._members[member], self.set.key, self._layout
        if is_data:
            volume = self.set.volumes[member]
            return segment_blocks(source, key, layout, member, stripe, volume=volume, first=first)
        ref = Ref(key, Kind.PARITY, stripe=stripe)
        return source.read(ref, first * BLOCK_BYTES, layout.segment_bytes)

    def _next(self, stream: Iterator[bytes], index: int, member: int, expected: int, *, is_data: bool) -> bytes:
        name = self.set.members[member]
        try:
            content = next(stream, b"")
        except SnapshotError as error:
            self._dead[member, is_data] = str(error)
            raise _BadError(index, str(error)) from None
        if xxhash.xxh3_64_intdigest(content) != expected:
            raise _BadError(index, f"a block of {name} is not what it was when the parity was computed")
        return content

    def _sums_of(self, stripe: int, member: int) -> Sums | None:
        """The digests that a keeper has of a stripe; None where they cannot be had."""
        with self._lock:
            if (stripe, member) not in self._sums:
                self._sums[stripe, member] = None
                if member in self._members:
                    with contextlib.suppress(SnapshotError):
                        content = read_all(self._members[member], Ref(self.set.key, Kind.SUMS, stripe=stripe))
                        self._sums[stripe, member] = parse_sums(content, self._layout, source="sums")
            return self._sums[stripe, member]

    def _parity_sum(self, stripe: int, member: int, block: int) -> int:
        sums = self._sums_of(stripe, member)
        assert sums is not None
        return int(sums[block, -1])
