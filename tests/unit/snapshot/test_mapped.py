"""A mapped file reads as `torch.load` reads it, never changes, and tells when something still lies in it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from resilience.snapshot.archive import Archive, picture
from resilience.snapshot.mapped import Mapped


@pytest.fixture
def path(tmp_path: Path) -> Path:
    flat = torch.arange(30.0)
    value = {
        "a": flat[:10],
        "b": flat[10:].view(4, 5),
        "half": torch.ones(7, dtype=torch.bfloat16),
        "none": torch.empty(0),
        "lr": 0.1,
    }
    archive = Archive(tmp_path / "file.pt", picture(value))
    archive.fill(picture(value))
    archive.close()
    return archive.path


def test_it_reads_what_torch_reads(path: Path) -> None:
    mapped = Mapped(path)
    found, expected = mapped.read(), torch.load(path, weights_only=False)
    assert list(found) == list(expected)
    for name in ("a", "b", "half", "none"):
        assert found[name].dtype == expected[name].dtype
        assert torch.equal(found[name], expected[name])
    assert found["lr"] == 0.1
    assert found["a"].untyped_storage()._cdata == found["b"].untyped_storage()._cdata


def test_writing_to_what_was_read_changes_no_file(path: Path) -> None:
    before = path.read_bytes()
    mapped = Mapped(path)
    found = mapped.read()
    found["a"].fill_(-1.0)
    assert path.read_bytes() == before
    assert found["a"].sum() == -10.0


def test_it_is_let_go_once_everything_was_copied_out(path: Path) -> None:
    mapped = Mapped(path)
    live = torch.zeros(10)
    live.copy_(mapped.read()["a"])
    assert mapped.close()
    assert live.tolist() == list(range(10))


def test_whatever_still_lies_in_it_keeps_it_and_is_told(path: Path) -> None:
    mapped = Mapped(path)
    kept = mapped.read()["b"]
    assert mapped.holds(kept)
    assert not mapped.holds(kept.clone())
    assert not mapped.close()
    assert kept[0, 0] == 10.0
    del kept
    assert mapped.close()
