"""What was saved between damage and its discovery is loaded by nobody; what is saved later under the same tag is."""

from __future__ import annotations

from pathlib import Path

import pytest

from resilience.checkpoint.doubt import DOUBT, Saved, SavedCheckpoints, doubt
from resilience.checkpoint.publish import MANIFEST, read_manifest
from resilience.checkpoint.verify import State, candidates, in_loading_order, inspect, locate, verify

from .conftest import Save


def states(save_dir: Path) -> dict[str, State]:
    return {candidate.tag: candidate.state for candidate in candidates(save_dir)}


def published(save: Save, step: int) -> Saved:
    tag_dir = save(f"s{step}", step=step)
    return Saved(tag_dir.parent, tag_dir.name, step)


def test_damage_casts_doubt_on_what_was_saved_after_the_newest_clean_step(save: Save, tmp_path: Path) -> None:
    told: list[tuple[Saved, str]] = []
    saved = SavedCheckpoints(lambda saved, text: told.append((saved, text)))
    for step in (2, 4, 6):
        saved.add(published(save, step))
    saved.distrust(4, found_at=9)
    assert states(tmp_path / "ck") == {"s2": State.PUBLISHED, "s4": State.PUBLISHED, "s6": State.DOUBTED}
    assert len(told) == 1
    assert "saved after step 6; damage to the state was found in step 9, and step 4 is the newest" in told[0][1]
    assert told[0][0].step == 6
    order = in_loading_order(candidates(tmp_path / "ck"), "s6")
    assert next(candidate.tag for candidate in order if not candidate.reason) == "s4"
    assert locate(tmp_path / "ck").name == "s4"
    saved.distrust(4, found_at=10)
    assert len(told) == 1, "each is doubted once"


def test_where_nobody_knows_since_when_the_state_is_wrong_nothing_is_doubted(save: Save, tmp_path: Path) -> None:
    saved = SavedCheckpoints(lambda _, text: pytest.fail(text))
    saved.add(published(save, 2))
    saved.distrust(-1, found_at=3)
    assert states(tmp_path / "ck") == {"s2": State.PUBLISHED}


def test_a_later_save_under_the_same_tag_is_not_doubted(save: Save, tmp_path: Path) -> None:
    doubt(save("same", step=2), "why")
    assert states(tmp_path / "ck") == {"same": State.DOUBTED}
    (tmp_path / "ck" / "same" / "mp_rank_00_model_states.pt").unlink()
    again = save("same", step=3)
    assert states(tmp_path / "ck") == {"same": State.DOUBTED}, "the same bytes are as doubtful as before"
    (again / "mp_rank_00_model_states.pt").write_bytes(b"other weights")
    (again / MANIFEST).unlink()
    (again / "extra.pt").write_bytes(b"more")
    save("same", step=4)
    assert states(tmp_path / "ck") == {"same": State.PUBLISHED}


def test_it_is_said_by_those_who_look_and_is_no_stray_file(save: Save, tmp_path: Path) -> None:
    tag_dir = save("s2", step=2)
    doubt(tag_dir, "damage was found in step 3")
    manifest = read_manifest(tag_dir)
    assert manifest is not None
    assert verify(tag_dir, manifest) == ()
    (seen,) = inspect(tmp_path / "ck", read_files=False)
    assert (seen.good, seen.problems) == (False, ("damage was found in step 3",))


def test_a_word_that_cannot_be_read_is_a_doubt_and_no_manifest_is_none(save: Save, tmp_path: Path) -> None:
    tag_dir = save("s2", step=2)
    doubt(tag_dir, "why")
    (tag_dir / DOUBT).write_text("{")
    (found,) = candidates(tmp_path / "ck")
    assert found.state is State.DOUBTED
    assert "cannot be read" in found.reason
    (tmp_path / "bare").mkdir()
    doubt(tmp_path / "bare", "why")
    assert not (tmp_path / "bare" / DOUBT).exists()


def test_a_mark_that_cannot_be_written_is_told(save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[Saved, str]] = []
    saved = SavedCheckpoints(lambda saved, text: told.append((saved, text)))
    saved.add(published(save, 2))

    def full(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("resilience.checkpoint.doubt.write_atomically", full)
    saved.distrust(1, found_at=3)
    assert "cannot be marked" in told[0][1]
