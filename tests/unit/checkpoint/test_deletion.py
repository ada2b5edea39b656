"""Deleting a plan's checkpoints: by one rename, with what was made of them, and never what a run uses by now."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from resilience.checkpoint.deletion import delete, known
from resilience.checkpoint.publish import Marker, write_atomically
from resilience.checkpoint.retention import Planned, Policy, Standing, plan
from resilience.checkpoint.verify import candidates, inspect
from resilience.errors import CheckpointError

Save = Callable[..., Path]


def planned(save_dir: Path, keep: int = 1) -> tuple[Planned, ...]:
    return plan([known(each) for each in inspect(save_dir, read_files=True)], Policy(keep=keep))


def test_old_ones_go_with_their_universal_forms(save: Save) -> None:
    for step in (1, 2, 3):
        save_dir = save(f"step{step}", step=step).parent
    (save_dir / "step1-universal" / "zero").mkdir(parents=True)
    (save_dir / "latest_universal").write_text("step1-universal")
    gone = delete(save_dir, planned(save_dir))
    assert [each.tag for each in gone] == ["step1", "step2"]
    assert all(each.num_bytes > 100 for each in gone)
    assert sorted(path.name for path in save_dir.iterdir()) == ["latest", "step3"]


def test_what_became_latest_or_is_being_saved_since_stays(save: Save) -> None:
    for step in (1, 2, 3):
        save_dir = save(f"step{step}", step=step).parent
    decided = planned(save_dir)
    (save_dir / "latest").write_text("step1")
    marker = Marker(run_id="run", generation=2, step=2, started_at=1.0)
    write_atomically(save_dir / "step2" / "resilience" / "saving.json", json.dumps(dataclasses.asdict(marker)).encode())
    assert delete(save_dir, decided) == []


def test_a_deletion_that_was_cut_short_is_no_candidate_and_is_finished_by_the_next(
    save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2):
        save_dir = save(f"step{step}", step=step).parent
    decided = planned(save_dir)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda path, **_: None)  # stands for a kill after the rename
        delete(save_dir, decided)
    assert [each.tag for each in candidates(save_dir)] == ["step2"]
    assert len(list(save_dir.iterdir())) == 3
    delete(save_dir, ())
    assert sorted(path.name for path in save_dir.iterdir()) == ["latest", "step2"]


def test_a_folder_that_cannot_be_renamed_is_one_clear_line(save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2):
        save_dir = save(f"step{step}", step=step).parent

    def refuse(self: Path, target: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(CheckpointError, match=r"step1 cannot be deleted \(Permission denied\); 0 were"):
        delete(save_dir, planned(save_dir))


def test_what_a_look_found_is_what_the_plan_is_told(save: Save) -> None:
    save_dir = save("step1", step=1).parent
    save("step2", step=2)
    (save_dir / "step1" / "deep" / "er" / "file.bin").write_bytes(b"changed")
    (save_dir / "step3").mkdir()
    (save_dir / "step3" / "mp_rank_00_model_states.pt").write_bytes(b"x")
    found = {each.tag: known(each) for each in inspect(save_dir, read_files=True)}
    assert {tag: each.standing for tag, each in found.items()} == {
        "step1": Standing.BAD,
        "step2": Standing.VERIFIED,
        "step3": Standing.UNKNOWN,
    }
    assert [tag for tag, each in found.items() if each.is_latest] == ["step2"]
