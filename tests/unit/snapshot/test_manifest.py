"""Commits and manifests: what comes back, and that nothing damaged does."""

from __future__ import annotations

import dataclasses
import json

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from resilience.errors import SnapshotError
from resilience.snapshot.manifest import (
    Commit,
    FileEntry,
    Hold,
    Manifest,
    Part,
    Record,
    merge,
    parse_commit,
    parse_holds,
    parse_manifest,
    serialise_commit,
    serialise_holds,
    serialise_manifest,
)

DIGEST = xxhash.xxh3_128_hexdigest(b"")


def commit(rank: int = 0, *, digest: str = "", step: int = 3, path: str = "state/model.pt") -> Commit:
    records = (
        Record(name="data/0", offset=64, size=100, digest=digest),
        Record(name="data/1", offset=192, size=8, digest=digest),
    )
    return Commit(
        run_id="run",
        generation=2,
        step=step,
        rank=rank,
        world_size=2,
        slot=1,
        sequence=7,
        at=12.5,
        clean_through=1,
        blocked_s=0.25,
        random={"torch": "AAA=", "python": [3, [1, 2], None]},
        counters={"micro_steps": 6},
        trail_bytes=4,
        files=(FileEntry(path=path, size=256, records=records, rest=digest),),
    )


def part(rank: int = 0, **changes: object) -> Part:
    return Part(commit=dataclasses.replace(commit(rank, digest=DIGEST), **changes), trail=DIGEST)  # type: ignore[arg-type]


def manifest(*parts: Part, node: str = "a") -> Manifest:
    return Manifest(
        run_id="run", generation=2, step=3, world_size=2, node=node, at=12.5, clean_through=1, parts=parts or (part(),)
    )


def sealed(body: object) -> bytes:
    text = json.dumps(body, separators=(",", ":")).encode()[:-1]
    return text + b',"checksum":"%s"}\n' % xxhash.xxh3_128_hexdigest(text).encode()


def body(content: bytes) -> dict[str, object]:
    parsed: dict[str, object] = json.loads(content)
    del parsed["checksum"]
    return parsed


def test_what_was_written_comes_back() -> None:
    assert parse_commit(serialise_commit(commit()), source="c") == commit()
    assert parse_manifest(serialise_manifest(manifest()), source="m") == manifest()
    holds = (Hold(3, "parity"), Hold(5, "restore", 2))
    assert parse_holds(serialise_holds([*reversed(holds), holds[0]]), source="h") == holds


def test_a_commit_says_nothing_of_digests() -> None:
    assert parse_commit(serialise_commit(commit(digest=DIGEST)), source="c") == commit()


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_flipped_bit_is_found(data: st.DataObject) -> None:
    content = bytearray(serialise_manifest(manifest()))
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(SnapshotError, match=r"m\.json"):
        parse_manifest(bytes(content), source="m.json")


@settings(max_examples=100, deadline=None)
@given(st.integers(0, len(serialise_commit(commit())) - 1))
def test_a_torn_one_is_refused(length: int) -> None:
    with pytest.raises(SnapshotError):
        parse_commit(serialise_commit(commit())[:length], source="c")


def test_another_version_is_named() -> None:
    content = sealed({**body(serialise_commit(commit())), "schema": 9})
    with pytest.raises(SnapshotError, match="version 9; this package reads 1"):
        parse_commit(content, source="c")


@pytest.mark.parametrize("path", ["/etc/passwd", "state/../../x", "state", "other/x", "../state/x"])
def test_paths_outside_of_the_slot_are_refused(path: str) -> None:
    with pytest.raises(SnapshotError, match="outside"):
        parse_commit(serialise_commit(commit(path=path)), source="c")


@pytest.mark.parametrize(
    ("offset", "size"), [(64, 129), (250, 8), (-1, 4)], ids=["into the next", "past the end", "negative"]
)
def test_records_that_overlap_are_refused(offset: int, size: int) -> None:
    entry = commit().files[0]
    second = Record(name="data/1", offset=192, size=8)
    records = (Record(name="data/0", offset=offset, size=size), second)
    if offset > second.offset:
        records = (second, records[0])
    broken = dataclasses.replace(commit(), files=(dataclasses.replace(entry, records=records),))
    with pytest.raises(SnapshotError):
        parse_commit(serialise_commit(broken), source="c")


@pytest.mark.parametrize("changes", [{"run_id": "other"}, {"generation": 1}, {"step": 4}, {"world_size": 1}])
def test_a_part_of_another_snapshot_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(SnapshotError, match="another snapshot"):
        parse_manifest(serialise_manifest(manifest(part(), part(1, **changes))), source="m")


def test_a_part_without_digests_is_refused() -> None:
    bare = Part(commit=commit(), trail=DIGEST)
    with pytest.raises(SnapshotError, match="lacks digests"):
        parse_manifest(serialise_manifest(manifest(bare)), source="m")
    with pytest.raises(SnapshotError, match="lacks digests"):
        parse_manifest(serialise_manifest(manifest(dataclasses.replace(part(), trail=""))), source="m")


@pytest.mark.parametrize("missing", ["files", "random", "sequence", "run_id"])
def test_a_missing_member_is_named(missing: str) -> None:
    shortened = body(serialise_commit(commit()))
    del shortened[missing]
    with pytest.raises(SnapshotError, match=missing):
        parse_commit(sealed(shortened), source="c")


def test_merging_takes_each_rank_once() -> None:
    both = merge([manifest(part(0), node="a"), manifest(part(1), node="b")], ranks=[1, 0, 1], node="c")
    assert both.ranks == (0, 1)
    assert both.node == "c"
    with pytest.raises(SnapshotError, match="rank 1"):
        merge([manifest(part(0))], ranks=[0, 1], node="c")
    with pytest.raises(SnapshotError, match="different snapshots"):
        merge([manifest(), dataclasses.replace(manifest(), step=4)], ranks=[0], node="c")
