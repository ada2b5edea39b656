"""Damage is found, and the right checkpoint is tried first."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
import torch

from resilience.checkpoint.publish import LATEST, MANIFEST, Marker, begin, read_latest, read_manifest
from resilience.checkpoint.verify import (
    State,
    candidates,
    check_plain,
    fallbacks,
    in_loading_order,
    inspect,
    locate,
    verify,
)
from resilience.errors import CheckpointError

from .conftest import Save

MODEL = "mp_rank_00_model_states.pt"


def found_wrong(tag_dir: Path, **share: int) -> list[str]:
    manifest = read_manifest(tag_dir)
    assert manifest is not None
    return [problem.detail for problem in verify(tag_dir, manifest, **share)]


def flip(path: Path, place: int = 3) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_a_good_one_has_no_problems(save: Save) -> None:
    assert found_wrong(save("a")) == []


def test_a_flipped_bit_is_found(save: Save) -> None:
    tag_dir = save("a")
    flip(tag_dir / MODEL)
    assert found_wrong(tag_dir) == [f"{MODEL} has another checksum than when it was saved"]


def test_a_torn_and_a_missing_file_are_found(save: Save) -> None:
    tag_dir = save("a")
    size = (tag_dir / MODEL).stat().st_size
    os.truncate(tag_dir / MODEL, 5)
    (tag_dir / "deep/er/file.bin").unlink()
    assert found_wrong(tag_dir) == ["deep/er/file.bin is missing", f"{MODEL} has 5 bytes, not {size}"]


def test_what_nobody_will_load_is_not_looked_at(save: Save) -> None:
    tag_dir = save("a")
    manifest = read_manifest(tag_dir)
    assert manifest is not None
    flip(tag_dir / MODEL)
    assert verify(tag_dir, manifest, leave_out=lambda path: path == MODEL) == ()
    assert verify(tag_dir, manifest, leave_out=lambda path: path != MODEL) != ()


def test_a_stray_file_is_found_once(save: Save) -> None:
    tag_dir = save("a")
    (tag_dir / "mp_rank_01_model_states.pt").write_bytes(b"stray")
    shares = [found_wrong(tag_dir, index=index, count=3) for index in range(3)]
    assert shares == [["mp_rank_01_model_states.pt is not in the manifest"], [], []]


def test_workers_together_find_what_one_finds(save: Save) -> None:
    tag_dir = save("a")
    for name in (MODEL, "deep/er/file.bin"):
        flip(tag_dir / name)
    shares = [found_wrong(tag_dir, index=index, count=2) for index in range(2)]
    assert sorted(shares[0] + shares[1]) == sorted(found_wrong(tag_dir))
    assert len(found_wrong(tag_dir)) == 2


def test_candidates_are_newest_first_and_named_for_what_they_are(save: Save) -> None:
    save_dir = save("global_step1", step=1).parent
    save("global_step3", step=3)
    begin(save_dir, "global_step4", Marker(run_id="run", generation=1, step=4, started_at=104.0))
    (save("global_step2", step=2) / MANIFEST).write_text("{}")
    os.utime(save_dir / "global_step2" / MANIFEST, (102.0, 102.0))
    (save_dir / "plain").mkdir()
    (save_dir / "plain" / MODEL).write_bytes(b"x")
    os.utime(save_dir / "plain" / MODEL, (50.0, 50.0))
    (save_dir / "no checkpoint").mkdir()
    found = candidates(save_dir)
    assert [(c.tag, c.state) for c in found] == [
        ("global_step4", State.UNFINISHED),
        ("global_step3", State.PUBLISHED),
        ("global_step2", State.DAMAGED),
        ("global_step1", State.PUBLISHED),
        ("plain", State.PLAIN),
    ]
    assert found[0].reason == "its save was never finished (begun by generation 1 of run run)"


def test_latest_is_honoured_and_a_newer_torn_one_is_named_first(save: Save) -> None:
    save_dir = save("one", step=1).parent
    save("two", step=2)
    save("three", step=3)
    begin(save_dir, "four", Marker(run_id="run", generation=1, step=4, started_at=104.0))
    order = in_loading_order(candidates(save_dir), "two")
    assert [c.tag for c in order] == ["four", "two", "three", "one"]


def test_without_latest_the_newest_comes_first_but_not_what_was_never_to_be_latest(save: Save) -> None:
    save_dir = save("one", step=1).parent
    save("two", step=2)
    save("best", step=3, latest=False)
    assert [c.tag for c in in_loading_order(candidates(save_dir), None)] == ["two", "one"]
    assert [c.tag for c in in_loading_order(candidates(save_dir), "best")] == ["best", "two", "one"]


def test_a_tag_falls_back_to_what_is_older_only(save: Save) -> None:
    save_dir = save("one", step=1).parent
    save("two", step=2)
    save("three", step=3)
    assert [c.tag for c in fallbacks(candidates(save_dir), "two")] == ["two", "one"]
    assert fallbacks(candidates(save_dir), "none") == []


def test_tags_with_slashes_and_their_siblings_are_found_when_one_is_named(save: Save) -> None:
    save_dir = save("runs/one", step=1).parent.parent
    save("runs/two", step=2)
    assert read_latest(save_dir) == "runs/two"
    assert candidates(save_dir) == []
    assert [c.tag for c in in_loading_order(candidates(save_dir, "runs/two"), "runs/two")] == ["runs/two", "runs/one"]
    assert [c.tag for c in fallbacks(candidates(save_dir, "runs/one"), "runs/one")] == ["runs/one"]
    elsewhere = (save_dir / "runs" / "two").as_posix()
    assert fallbacks(candidates(save_dir.parent, elsewhere), elsewhere)[0].tag == elsewhere
    assert locate(save_dir) == save_dir / "runs" / "two"


def test_what_is_no_checkpoint_stands_in_no_one_s_way(save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    save_dir = save("one", step=1).parent
    (save_dir / "bin").mkdir()
    (save_dir / "bin" / "resilience").write_text("a command")
    universal = save_dir / "one_universal"
    (universal / "zero").mkdir(parents=True)
    (universal / MODEL).write_bytes(b"for load_universal_checkpoint")
    (save_dir / "lost+found").mkdir()
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "lost+found" and access(path, mode))
    assert [c.tag for c in candidates(save_dir)] == ["one"]


def test_a_directory_that_is_not_there_has_no_candidates(tmp_path: Path) -> None:
    assert candidates(tmp_path / "none") == []


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """What DeepSpeed writes without us."""
    tag_dir = tmp_path / "ck" / "global_step1"
    tag_dir.mkdir(parents=True)
    torch.save({"weight": torch.arange(1000.0)}, tag_dir / MODEL)
    return tag_dir


def test_files_without_a_manifest_are_held_against_the_crcs_that_torch_wrote(plain: Path) -> None:
    assert check_plain(plain, [MODEL]) == ()
    content = (plain / MODEL).read_bytes()
    place = content.index(torch.arange(1000.0)[500:504].numpy().tobytes())
    flip(plain / MODEL, place)
    assert torch.load(plain / MODEL, weights_only=True)["weight"][500] != 500  # torch itself sees nothing
    (problem,) = check_plain(plain, [MODEL])
    assert "has another CRC" in problem.detail


@pytest.mark.parametrize("kept", [0, 3, 1000])
def test_a_torn_file_without_a_manifest_is_found(plain: Path, kept: int) -> None:
    content = (plain / MODEL).read_bytes()
    (plain / MODEL).write_bytes(content[:kept])
    (problem,) = check_plain(plain, [MODEL])
    assert problem.fatal


def test_a_missing_file_without_a_manifest_is_found(plain: Path) -> None:
    assert [problem.detail for problem in check_plain(plain, ["other.pt"])] == ["other.pt is missing"]


def test_locate_takes_a_tag_a_latest_or_the_newest(save: Save, tmp_path: Path) -> None:
    save("one", step=1)
    tag_dir = save("two", step=2)
    (tag_dir.parent / LATEST).write_text("one")
    assert locate(tag_dir) == tag_dir
    assert locate(tag_dir.parent).name == "one"
    (tag_dir.parent / LATEST).unlink()
    assert locate(tag_dir.parent).name == "two"
    with pytest.raises(CheckpointError, match="no checkpoint there"):
        locate(tmp_path / "nothing")


def test_inspect_reads_files_only_when_asked(save: Save) -> None:
    tag_dir = save("one", step=1)
    flip(tag_dir / MODEL)
    (quick,) = inspect(tag_dir.parent, read_files=False)
    (thorough,) = inspect(tag_dir, read_files=True)
    assert quick.good
    assert quick.latest
    assert not thorough.good
    assert thorough.problems == (f"{MODEL} has another checksum than when it was saved",)
    assert thorough.num_files == 3


def test_a_legacy_file_is_only_seen_to_be_there(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save(torch.ones(2), buffer, _use_new_zipfile_serialization=False)
    (tmp_path / MODEL).write_bytes(buffer.getvalue())
    assert check_plain(tmp_path, [MODEL]) == ()
