"""Digests of files, held against the hash of the bytes themselves."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from resilience.errors import SnapshotError
from resilience.snapshot.hashing import (
    Interrupted,
    hash_file,
    hash_head,
    hash_part,
    verify_file,
    verify_files,
    verify_trail,
)
from resilience.snapshot.manifest import Commit, FileEntry, Record


def entry(size: int, *places: tuple[int, int]) -> FileEntry:
    records = tuple(Record(name=f"data/{i}", offset=at, size=length) for i, (at, length) in enumerate(places))
    return FileEntry(path="state/x.pt", size=size, records=records)


def oracle(content: bytes, shape: FileEntry) -> FileEntry:
    """The digests by slicing what was read at once."""
    rest, end, records = b"", 0, []
    for record in shape.records:
        rest += content[end : record.offset]
        end = record.offset + record.size
        digest = xxhash.xxh3_128_hexdigest(content[record.offset : end])
        records.append(dataclasses.replace(record, digest=digest))
    rest += content[end:]
    return dataclasses.replace(shape, records=tuple(records), rest=xxhash.xxh3_128_hexdigest(rest))


@pytest.mark.parametrize(
    "shape",
    [
        entry(0),
        entry(5),
        entry(5, (0, 5)),
        entry(5_000_001, (64, 1), (65, 3_000_000), (4_000_000, 1_000_001)),
        entry((1 << 20) + 1, (0, 1 << 20)),
    ],
    ids=["empty", "no record", "nothing else", "odd places", "one byte over"],
)
def test_digests_are_those_of_the_bytes(tmp_path: Path, shape: FileEntry) -> None:
    content = random.Random(1).randbytes(shape.size)
    path = tmp_path / "x"
    path.write_bytes(content)
    found = hash_file(path, shape)
    assert found == oracle(content, shape)
    verify_file(path, found)
    assert hash_head(path, shape.size // 2) == xxhash.xxh3_128_hexdigest(content[: shape.size // 2])


@settings(max_examples=100, deadline=None)
@given(at=st.integers(0, 9_999), bit=st.integers(0, 7))
def test_any_flipped_bit_is_found_where_it_is(tmp_path_factory: pytest.TempPathFactory, at: int, bit: int) -> None:
    content = bytearray(random.Random(2).randbytes(10_000))
    path = tmp_path_factory.getbasetemp() / "flipped"
    path.write_bytes(content)
    hashed = hash_file(path, entry(10_000, (100, 4_000), (5_000, 4_000)))
    content[at] ^= 1 << bit
    path.write_bytes(content)
    where = "data/0" if 100 <= at < 4_100 else "data/1" if 5_000 <= at < 9_000 else "outside of its records"
    with pytest.raises(SnapshotError, match=where):
        verify_file(path, hashed)


def test_several_threads_find_the_first_file_that_differs(tmp_path: Path) -> None:
    files = []
    for number in range(3):
        path = tmp_path / str(number)
        path.write_bytes(random.Random(number).randbytes(10_000))
        files.append((path, hash_file(path, entry(10_000, (100, 4_000), (5_000, 4_000)))))
    verify_files(files, num_threads=3)
    for path, _ in files[1:]:
        content = bytearray(path.read_bytes())
        content[5_500] ^= 1
        path.write_bytes(content)
    with pytest.raises(SnapshotError, match=r"/1: record data/1 "):
        verify_files(files, num_threads=3)


def test_what_is_short_or_gone_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with pytest.raises(SnapshotError, match="cannot be read"):
        hash_file(path, entry(5))
    path.write_bytes(b"1234")
    with pytest.raises(SnapshotError, match="has 4 bytes, not 5"):
        hash_file(path, entry(5))
    with pytest.raises(SnapshotError, match="ends at 4 bytes, not 5"):
        hash_head(path, 5)


def test_whoever_does_not_want_it_any_more_is_not_kept(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(bytes(3 << 20))
    answers = iter([True, False])
    with pytest.raises(Interrupted):
        hash_file(path, entry(3 << 20), wanted=lambda: next(answers))


def test_a_trail_is_hashed_as_far_as_the_commit_says(tmp_path: Path) -> None:
    trail = tmp_path / "trail.bin"
    trail.write_bytes(b"12345678")
    commit = Commit(
        run_id="run", generation=1, step=1, rank=0, world_size=1, slot=0, sequence=1, at=0.0, clean_through=0,
        blocked_s=0.0, random={}, counters={}, trail_bytes=4, files=(),
    )  # fmt: skip
    part = hash_part(commit, tmp_path, trail)
    assert part.trail == xxhash.xxh3_128_hexdigest(b"1234")
    trail.write_bytes(b"1234, and what came later")
    verify_trail(trail, part)
    trail.write_bytes(b"123x")
    with pytest.raises(SnapshotError, match="trail is not"):
        verify_trail(trail, part)
