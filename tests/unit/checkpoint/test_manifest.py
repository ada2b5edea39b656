"""What a manifest says, and every way in which a directory can differ from it."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilience.checkpoint.manifest import (
    FileEntry,
    Manifest,
    ProblemKind,
    assign,
    compare,
    describe,
    parse,
    serialise,
    visible,
)
from resilience.errors import CheckpointError

FILES = {
    "mp_rank_00_model_states.pt": FileEntry(size=10, digest="aa"),
    "resilience/random-rank-00000.json": FileEntry(size=3, digest="bb"),
}
MANIFEST = Manifest(
    run_id="run",
    generation=2,
    tag="global_step4",
    step=4,
    last_verified_step=4,
    world_size=2,
    zero_stage=2,
    latest=True,
    created_at=1000.5,
    files=FILES,
)


def test_a_manifest_reads_back_as_it_was_written() -> None:
    assert parse(serialise(MANIFEST), source="m") == MANIFEST


@given(st.integers(min_value=0, max_value=len(serialise(MANIFEST)) - 1), st.integers(min_value=0, max_value=6))
def test_a_flipped_bit_anywhere_is_refused_or_changes_nothing(place: int, bit: int) -> None:
    text = bytearray(serialise(MANIFEST).encode())
    text[place] ^= 1 << bit
    try:
        read = parse(text.decode(errors="replace"), source="m")
    except CheckpointError:
        return
    assert read == MANIFEST  # white space between the values


def test_a_torn_manifest_is_refused() -> None:
    with pytest.raises(CheckpointError, match="m: the manifest is torn"):
        parse(serialise(MANIFEST)[:-20], source="m")


def test_another_version_is_named() -> None:
    content = json.loads(serialise(MANIFEST)) | {"schema_version": 9}
    with pytest.raises(CheckpointError, match="version 9; this package reads 1"):
        parse(json.dumps(content), source="m")


@pytest.mark.parametrize("path", ["/etc/passwd", "../other/file", "a/../../b"])
def test_a_path_out_of_the_checkpoint_is_refused(path: str) -> None:
    stray = dataclasses.replace(MANIFEST, files={path: FileEntry(size=1, digest="x")})
    with pytest.raises(CheckpointError, match="outside of the checkpoint"):
        parse(serialise(stray), source="m")


def test_every_difference_is_found_and_named() -> None:
    found = {
        "resilience/random-rank-00000.json": FileEntry(size=3, digest="zz"),
        "mp_rank_01_model_states.pt": FileEntry(size=1, digest=""),
        "notes.txt": FileEntry(size=1, digest=""),
        "other_tag/mp_rank_00_model_states.pt": FileEntry(size=1, digest=""),
        "scripts_own.pt": FileEntry(size=1, digest=""),
    }
    problems = compare(MANIFEST, found)
    assert [(p.kind, p.path, p.fatal) for p in problems] == [
        (ProblemKind.MISSING, "mp_rank_00_model_states.pt", True),
        (ProblemKind.EXTRA, "mp_rank_01_model_states.pt", True),
        (ProblemKind.EXTRA, "notes.txt", False),
        (ProblemKind.EXTRA, "other_tag/mp_rank_00_model_states.pt", False),
        (ProblemKind.CHECKSUM, "resilience/random-rank-00000.json", True),
        (ProblemKind.EXTRA, "scripts_own.pt", False),
    ]
    assert describe(problems) == "mp_rank_00_model_states.pt is missing (and 5 more)"


def test_a_size_is_compared_before_a_checksum() -> None:
    found = dict(FILES) | {"mp_rank_00_model_states.pt": FileEntry(size=9, digest="")}
    (problem,) = compare(MANIFEST, found)
    assert (problem.kind, problem.detail) == (ProblemKind.SIZE, "mp_rank_00_model_states.pt has 9 bytes, not 10")


def test_files_of_other_nodes_are_left_to_them() -> None:
    files = {
        "shared.pt": FileEntry(size=1, digest="s"),
        "a:own.pt": FileEntry(size=1, digest="a", node="a"),
        "b:own.pt": FileEntry(size=1, digest="b", node="b"),
    }
    manifest = dataclasses.replace(MANIFEST, files=files)
    assert visible(manifest, "a") == {"own.pt": files["a:own.pt"], "shared.pt": files["shared.pt"]}
    assert compare(manifest, visible(manifest, "b"), node="b") == ()


@given(
    st.dictionaries(st.text(min_size=1, max_size=5), st.integers(min_value=0, max_value=1 << 30), max_size=20),
    st.integers(min_value=1, max_value=5),
)
def test_the_workers_share_every_file_exactly_once(sizes: dict[str, int], count: int) -> None:
    shares = [assign(sizes, index, count) for index in range(count)]
    assert sorted(path for share in shares for path in share) == sorted(sizes)


def test_the_work_is_shared_by_bytes() -> None:
    sizes = {"big": 100, "a": 50, "b": 30, "c": 21}
    assert assign(sizes, 0, 2) == ("big",)
    assert assign(sizes, 1, 2) == ("a", "b", "c")
