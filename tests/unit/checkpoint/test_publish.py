"""What is seen of a save while it goes on, when it ends, and when it comes from an older generation."""

from __future__ import annotations

from pathlib import Path

import pytest

from resilience.checkpoint import publish as publishing
from resilience.checkpoint.publish import (
    MANIFEST,
    MARKER,
    Marker,
    begin,
    read_latest,
    read_manifest,
    read_marker,
    write_atomically,
)
from resilience.errors import FencedError

from .conftest import Save


def marker(generation: int, run_id: str = "run") -> Marker:
    return Marker(run_id=run_id, generation=generation, step=9, started_at=109.0)


def test_what_is_published_has_a_manifest_and_no_marker(save: Save) -> None:
    tag_dir = save("global_step4", step=4)
    assert not (tag_dir / MARKER).exists()
    manifest = read_manifest(tag_dir)
    assert manifest is not None
    assert sorted(manifest.files) == [
        "deep/er/file.bin",
        "mp_rank_00_model_states.pt",
        "zero_pp_rank_0_mp_rank_00_optim_states.pt",
    ]
    assert read_latest(tag_dir.parent) == "global_step4"


def test_latest_stays_where_the_script_did_not_want_it_moved(save: Save) -> None:
    save("global_step4", step=4)
    tag_dir = save("best", step=5, latest=False)
    assert read_latest(tag_dir.parent) == "global_step4"


def test_a_save_that_begins_is_marked_and_leaves_latest_alone(save: Save) -> None:
    save_dir = save("global_step4", step=4).parent
    begin(save_dir, "global_step9", marker(1))
    assert read_marker(save_dir / "global_step9") == marker(1)
    assert read_manifest(save_dir / "global_step9") is None
    assert read_latest(save_dir) == "global_step4"


def test_an_older_generation_publishes_nothing_any_more(save: Save) -> None:
    save_dir = save("global_step8", step=8, generation=2).parent
    for tag in ("global_step8", "global_step9"):
        with pytest.raises(FencedError, match=r"published by generation 2 .* belongs to generation 1"):
            begin(save_dir, tag, marker(1))
    assert not (save_dir / "global_step9").exists()


def test_an_older_generation_that_began_before_is_stopped_at_the_end(save: Save) -> None:
    with pytest.raises(FencedError):
        _publish_late(save)


def _publish_late(save: Save) -> None:
    original = publishing.begin
    save_dir = save("global_step8", step=8, generation=2).parent
    assert read_latest(save_dir) == "global_step8"
    original(save_dir, "global_step9", marker(2))
    save("global_step9", step=9, generation=1)


def test_a_run_that_is_launched_again_under_its_name_may_go_on(save: Save) -> None:
    save_dir = save("global_step8", step=8, generation=3).parent  # at 108 s
    begin(save_dir, "global_step9", marker(1), since=108.5)
    with pytest.raises(FencedError):
        begin(save_dir, "global_step9", marker(1), since=107.5)


def test_another_run_may_overwrite(save: Save) -> None:
    save("global_step8", step=8, generation=2)
    tag_dir = save("global_step8", step=8, generation=1, run_id="later")
    manifest = read_manifest(tag_dir)
    assert manifest is not None
    assert manifest.run_id == "later"


def test_a_newer_generation_may_overwrite(save: Save) -> None:
    save("global_step8", step=8, generation=1)
    tag_dir = save("global_step8", step=8, generation=2)
    manifest = read_manifest(tag_dir)
    assert manifest is not None
    assert manifest.generation == 2


def test_a_failed_write_leaves_the_old_content_and_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "latest"
    write_atomically(path, b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(publishing.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, b"new")
    assert [(entry.name, entry.read_bytes()) for entry in tmp_path.iterdir()] == [("latest", b"old")]


def test_a_damaged_marker_still_says_that_a_save_began(save: Save) -> None:
    save_dir = save("global_step4", step=4).parent
    begin(save_dir, "global_step9", marker(1))
    (save_dir / "global_step9" / MARKER).write_text("{")
    assert read_marker(save_dir / "global_step9") is not None


def test_a_damaged_manifest_protects_nothing(save: Save) -> None:
    tag_dir = save("global_step8", step=8, generation=2)
    (tag_dir / MANIFEST).write_text("{")
    begin(tag_dir.parent, "global_step8", marker(1))
