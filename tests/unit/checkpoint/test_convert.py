"""What was converted appears whole or not at all, once for each save."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from resilience.checkpoint import convert as subject
from resilience.checkpoint.convert import identify, is_good, is_made_of, read_origin, universal_of
from resilience.checkpoint.verify import candidates, inspect, locate
from resilience.errors import CheckpointError

Save = Callable[..., Path]


def converted(source: Path, target: Path) -> None:
    """Stands for DeepSpeed's conversion."""
    for name in ("weight", "bias"):
        (target / "zero" / name).mkdir(parents=True)
        (target / "zero" / name / "fp32.pt").write_bytes(name.encode() * 100)
    (target / "mp_rank_00_model_states.pt").write_bytes((source / "mp_rank_00_model_states.pt").read_bytes())
    (target.parent / "latest_universal").write_text(target.name)


def make(tag_dir: Path, run: Callable[[Path, Path], None] = converted) -> Path:
    return subject.convert(tag_dir, identify(tag_dir, verified=False), run, now=500.0)


def test_it_lies_beside_its_source_whole_and_is_no_checkpoint_to_load_by_itself(save: Save) -> None:
    tag_dir = save("step1")
    universal = make(tag_dir)
    assert universal == universal_of(tag_dir)
    assert is_good(universal)
    assert read_origin(universal) == identify(tag_dir, verified=False)
    assert [each.tag for each in candidates(tag_dir.parent)] == ["step1"]
    assert sorted(path.name for path in tag_dir.parent.iterdir()) == ["latest", "step1", "step1-universal"]
    assert locate(universal) == universal
    assert all(each.good for each in inspect(tag_dir.parent, read_files=True))


def test_a_failure_leaves_nothing(save: Save) -> None:
    tag_dir = save("step1")

    def fail(source: Path, target: Path) -> None:
        converted(source, target)
        raise CheckpointError("no")

    with pytest.raises(CheckpointError, match="no"):
        make(tag_dir, fail)
    assert sorted(path.name for path in tag_dir.parent.iterdir()) == ["latest", "step1"]


def test_what_a_killed_process_left_is_cleared_away_and_never_a_candidate(save: Save) -> None:
    tag_dir = save("step1")
    host = os.uname().nodename
    left = tag_dir.parent / f".resilience-converting-step1-universal.{host}-999999999"
    converted(tag_dir, left / "step1-universal")
    (left / "mp_rank_00_model_states.pt").write_bytes(b"x")
    elsewhere = tag_dir.parent / ".resilience-converting-step1-universal.another-host-1"
    elsewhere.mkdir()
    assert [each.tag for each in candidates(tag_dir.parent)] == ["step1"]
    make(tag_dir)
    assert not left.exists()
    assert elsewhere.exists()  # who works there cannot be told


def test_a_source_that_was_saved_anew_makes_the_old_form_stale(save: Save) -> None:
    universal = make(save("step1"))
    again = save("step1", generation=2)
    assert not is_made_of(universal, identify(again, verified=False))
    assert is_good(make(again))
    assert is_made_of(universal, identify(again, verified=False))


def test_a_source_that_is_saved_anew_meanwhile_is_not_published(save: Save) -> None:
    tag_dir = save("step1")

    def slow(source: Path, target: Path) -> None:
        converted(source, target)
        save("step1", generation=2)

    with pytest.raises(CheckpointError, match="saved anew while it was converted"):
        make(tag_dir, slow)
    assert not universal_of(tag_dir).exists()


@pytest.mark.parametrize("name", ["zero/weight/fp32.pt", "resilience/manifest.json", "mp_rank_00_model_states.pt"])
def test_one_flipped_bit_is_seen(save: Save, name: str) -> None:
    universal = make(save("step1"))
    content = bytearray((universal / name).read_bytes())
    content[len(content) // 2] ^= 1
    (universal / name).write_bytes(content)
    assert not is_good(universal)


def test_a_damaged_source_is_not_converted(save: Save) -> None:
    tag_dir = save("step1")
    (tag_dir / "mp_rank_00_model_states.pt").write_bytes(b"other")
    with pytest.raises(CheckpointError, match=r"has 5 bytes, not .*; it is not converted"):
        make(tag_dir)


def test_what_is_no_checkpoint_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint there"):
        identify(tmp_path, verified=False)
