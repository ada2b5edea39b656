"""One member's part of an exchange: read the segments of the stripes whose parity it keeps, encode, store.

Block by block, so that memory is bounded by one block of each member, whatever the size of the state.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import xxhash

from resilience.errors import SnapshotError
from resilience.snapshot.arena import room
from resilience.snapshot.groups import Layout
from resilience.snapshot.holdings import Kind, Ref, Source, read_all
from resilience.snapshot.kept import Key, ParitySet, num_blocks, serialise_sums
from resilience.snapshot.manifest import Manifest, parse_manifest
from resilience.snapshot.parity import Code
from resilience.snapshot.transport import Pace
from resilience.snapshot.volume import BLOCK_BYTES, volume_bytes

__all__ = ["Interrupted", "encode", "padded", "segment_blocks"]


class Interrupted(Exception):
    """Whoever asked for the parity does not want it any more."""


def encode(
    folder: Path,
    key: Key,
    *,
    members: tuple[str, ...],
    losses: int,
    place: int,
    sources: Sequence[Source],
    wanted: Callable[[], bool],
    bytes_per_s: float | None = None,
) -> ParitySet:
    """Store the parity that a member keeps of a snapshot.

    Args:
        folder: where to store it; it must not be there yet.
        key: the snapshot; every member holds it.
        members: the group's nodes, in its order.
        losses: lost members that the others shall make up for.
        place: of this node among the members.
        sources: the members, in the same order.
        wanted: asked after each block whether to go on.
        bytes_per_s: most bytes a second that are read from other nodes; None for no bound.

    Returns:
        What was stored.

    Raises:
        SnapshotError: a member cannot be read, or there is no room for the parity.
        Interrupted: it is not wanted any more.
    """
    contents = [read_all(s, Ref(key, Kind.MANIFEST, node=n)) for s, n in zip(sources, members, strict=True)]
    manifests = [_manifest(content, key, node) for content, node in zip(contents, members, strict=True)]
    parity_set = ParitySet(
        run_id=manifests[place].run_id,
        step=key.step,
        generation=key.generation,
        members=members,
        losses=losses,
        volumes=tuple(volume_bytes(manifest) for manifest in manifests),
    )
    layout = parity_set.layout
    _check_room(folder, key, losses * layout.segment_bytes)
    pace = None if bytes_per_s is None else Pace(bytes_per_s, threading.Event().wait)
    try:
        folder.mkdir()
        for index, content in enumerate(contents):
            (folder / f"manifest-{index}.json").write_bytes(content)
        for stripe in layout.kept(place):
            _encode_stripe(folder, key, parity_set, layout, stripe, place, sources, wanted, pace)
        (folder / "set.json").write_bytes(parity_set.serialise())
    except OSError as error:
        raise SnapshotError(
            f"parity of the snapshot of {key}: {error.filename or folder} cannot be written ({error.strerror})"
        ) from None
    return parity_set


def _encode_stripe(
    folder: Path,
    key: Key,
    parity_set: ParitySet,
    layout: Layout,
    stripe: int,
    place: int,
    sources: Sequence[Source],
    wanted: Callable[[], bool],
    pace: Pace | None,
) -> None:
    members = layout.sources(stripe)
    row = layout.keepers(stripe).index(place)
    code = Code(len(members), layout.losses)
    streams = [
        segment_blocks(sources[m], key, layout, m, stripe, volume=parity_set.volumes[m], first=0) for m in members
    ]
    sums = np.zeros((num_blocks(layout), len(members) + 1), np.uint64)
    with (folder / f"stripe-{stripe}.parity").open("wb") as writer:
        for block in range(len(sums)):
            if not wanted():
                raise Interrupted
            data = [next(stream) for stream in streams]
            parity = code.encode(data)[row]
            writer.write(parity)
            sums[block] = [xxhash.xxh3_64_intdigest(each) for each in (*data, parity)]
            if pace is not None:
                pace.take(sum(map(len, data)))
    (folder / f"stripe-{stripe}.sums").write_bytes(serialise_sums(sums))


def segment_blocks(
    source: Source, key: Key, layout: Layout, member: int, stripe: int, *, volume: int, first: int
) -> Iterator[bytes]:
    """The blocks of a member's segment from the `first`-th on, what is beyond its volume as zeros.

    Args:
        source: the member.
        key: the snapshot.
        layout: how the volumes lie in stripes.
        member: its place in the group.
        stripe: the segment's stripe.
        volume: bytes of its volume.
        first: number of the first block that is wanted.

    Raises:
        SnapshotError: it cannot be read.
    """
    base = layout.segment(member, stripe)
    start = min(base + first * BLOCK_BYTES, volume)
    end = min(base + layout.segment_bytes, volume)
    stream = source.read(Ref(key, Kind.DATA), start, end) if start < end else iter(())
    for block in range(first, num_blocks(layout)):
        yield padded(next(stream, b""), layout, block)


def padded(content: bytes, layout: Layout, block: int) -> bytes:
    """A block of a segment at its full length."""
    return content.ljust(min(BLOCK_BYTES, layout.segment_bytes - block * BLOCK_BYTES), b"\0")


def _manifest(content: bytes, key: Key, node: str) -> Manifest:
    manifest = parse_manifest(content, source=f"manifest of {node}")
    if (manifest.node, manifest.step, manifest.generation) != (node, key.step, key.generation):
        raise SnapshotError(f"{node}: gave a manifest of {manifest.node}, step {manifest.step}, for that of {key}")
    return manifest


def _check_room(folder: Path, key: Key, num_bytes: int) -> None:
    there = room(folder.parent).bytes
    if num_bytes > there:
        raise SnapshotError(
            f"parity of the snapshot of {key} needs {num_bytes >> 20} MiB in {folder.parent}, {there >> 20} MiB "
            "are left; give snapshot.dir more room, fewer slots, or set snapshot.parity_losses = 0"
        )
