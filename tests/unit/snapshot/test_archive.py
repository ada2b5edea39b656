"""A prepared file is what `torch.save` would have written, is filled in place, and keeps its records where they are."""

from __future__ import annotations

import errno
import os
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from resilience.errors import SnapshotError
from resilience.snapshot.archive import Archive, as_bytes, picture
from resilience.snapshot.hashing import hash_file, verify_file


def state(seed: int, width: int = 257) -> dict[str, Any]:
    """As varied as what DeepSpeed saves: views of one storage, scalars, empty tensors, other types, plain values."""
    generator = torch.Generator().manual_seed(seed)
    flat = torch.randn(3 * width, generator=generator)
    return {
        "module": OrderedDict(a=flat[:width], b=flat[width:].view(2, width), tied=flat[:width]),
        "half": torch.randn(width, generator=generator).to(torch.bfloat16),
        "mask": torch.rand(width, generator=generator) > 0.5,
        "step": torch.tensor(float(seed)),
        "nothing": torch.empty(0),
        "parameter": torch.nn.Parameter(torch.randn(3, generator=generator), requires_grad=False),
        "counters": {"global_steps": seed, "name": "x" * seed, "betas": (0.9, 0.95), "scale": None},
    }


def assert_same(found: Any, expected: Any) -> None:
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key, value in expected.items():
            assert_same(found[key], value)
    else:
        assert found == expected


@pytest.mark.parametrize("options", [{"weights_only": True}, {"weights_only": False}, {"mmap": True}], ids=str)
def test_torch_load_reads_it(tmp_path: Path, options: dict[str, Any]) -> None:
    archive = Archive(tmp_path / "file.pt", picture(state(1)))
    for seed in (1, 5, 2):
        archive.fill(picture(state(seed)))
        found = torch.load(archive.path, **options)
        assert_same(found, state(seed))
        # Views of one storage still are.
        assert found["module"]["a"].untyped_storage()._cdata == found["module"]["b"].untyped_storage()._cdata
        del found
    archive.close()


def test_what_is_pictured_is_not_copied_before_it_is_filled_in(tmp_path: Path) -> None:
    live = state(3)
    image = picture(live)
    live["step"].fill_(77.0)
    archive = Archive(tmp_path / "file.pt", image)
    archive.fill(image)
    # And from then on, the file is no part of what lives.
    live["step"].fill_(0.0)
    assert torch.load(archive.path)["step"] == 77.0
    archive.close()


def test_its_records_are_the_bytes_of_the_storages(tmp_path: Path) -> None:
    image = picture(state(1))
    archive = Archive(tmp_path / "file.pt", image)
    entry = archive.fill(image)
    content = archive.path.read_bytes()
    storages = dict(image.storages)
    assert entry.size == len(content)
    assert {record.name for record in entry.records} == {name for name, size in image.sizes if size}
    end = 0
    for record in entry.records:
        assert record.offset >= end
        end = record.offset + record.size
        assert content[record.offset : end] == as_bytes(storages[record.name]).numpy().tobytes()
    archive.close()


def test_it_stays_in_place_while_the_pickle_grows_and_is_laid_out_anew_when_it_cannot(tmp_path: Path) -> None:
    small, large = state(1), state(1)
    large["counters"]["name"] = "y" * (1 << 20)
    archive = Archive(tmp_path / "file.pt", picture(small))
    assert archive.fits(picture(state(9)))
    assert not archive.fits(picture(large))
    assert not archive.fits(picture(state(1, width=258)))
    first = archive.fill(picture(small))
    second = archive.fill(picture(state(9)))
    assert [(r.name, r.offset, r.size) for r in first.records] == [(r.name, r.offset, r.size) for r in second.records]
    archive.close()
    again = Archive(archive.path, picture(large))
    again.fill(picture(large))
    assert_same(torch.load(again.path), large)
    again.close()


def test_a_file_of_a_process_that_ended_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    first = Archive(path, picture(state(1)))
    first.fill(picture(state(1)))
    first.close()
    inode = path.stat().st_ino
    again = Archive(path, picture(state(1_000)))
    assert path.stat().st_ino == inode
    again.fill(picture(state(1_000)))
    assert_same(torch.load(path), state(1_000))
    assert sorted(tmp_path.iterdir()) == [path]
    again.close()


@pytest.mark.parametrize("why", ["linked", "another width", "torn", "a hole", "a flipped header"])
def test_a_file_that_is_not_as_it_should_be_is_laid_out_anew(tmp_path: Path, why: str) -> None:
    path = tmp_path / "file.pt"
    width = 260 if why == "another width" else 257
    first = Archive(path, picture(state(1, width=width)))
    entry = first.fill(picture(state(1, width=width)))
    first.close()
    held = path.open("rb")  # the inode is not given to another file meanwhile
    if why == "linked":
        (tmp_path / "restore.pt").hardlink_to(path)
    elif why == "torn":
        with path.open("r+b") as file:
            file.truncate(entry.size - 1)
    elif why == "a hole":
        path.write_bytes(b"")
        with path.open("r+b") as file:
            file.truncate(entry.size)
    elif why == "a flipped header":
        with path.open("r+b") as file:
            file.seek(entry.size - 3)
            file.write(b"\xaa")
    before = held.read()
    with held:
        again = Archive(path, picture(state(2)))
        assert path.stat().st_ino != os.fstat(held.fileno()).st_ino
        again.fill(picture(state(2)))
        assert_same(torch.load(path), state(2))
        held.seek(0)
        assert held.read() == before
    again.close()


def test_names_and_offsets_are_those_that_torch_sees(tmp_path: Path) -> None:
    image = picture(state(1))
    archive = Archive(tmp_path / "file.pt", image)
    entry = archive.fill(image)
    reader: Any = torch._C.PyTorchFileReader(str(archive.path))
    assert {r.name: r.offset for r in entry.records} == {
        r.name: reader.get_record_offset(r.name) for r in entry.records
    }
    with zipfile.ZipFile(archive.path) as zipped:
        assert sum(name.endswith("data.pkl") for name in zipped.namelist()) == 1
    archive.close()


@pytest.mark.parametrize("place", ["record", "pickle", "end"])
def test_a_flipped_bit_is_found_before_it_is_read(tmp_path: Path, place: str) -> None:
    image = picture(state(1))
    archive = Archive(tmp_path / "file.pt", image)
    entry = hash_file(archive.path, archive.fill(image))
    verify_file(archive.path, entry)
    at = {"record": entry.records[0].offset, "pickle": archive._pickle_at + 7, "end": entry.size - 3}[place]
    with archive.path.open("r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 16]))
    with pytest.raises(SnapshotError, match=r"record data/|outside of its records"):
        verify_file(archive.path, entry)
    archive.close()


def test_a_full_file_system_is_said_in_one_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    path = tmp_path / "file.pt"
    with pytest.raises(SnapshotError, match=r"file\.pt: cannot be laid out .*No space left.*full\?"):
        Archive(path, picture(state(1)))
    assert list(tmp_path.iterdir()) == []


def test_nothing_grows_over_a_thousand_fills(tmp_path: Path) -> None:
    process = psutil.Process()
    archive = Archive(tmp_path / "file.pt", picture(state(1)))
    for number in range(50):
        archive.fill(picture(state(number % 7)))
    num_files, size = process.num_fds(), archive.path.stat().st_size
    resident = process.memory_info().rss
    for number in range(1000):
        archive.fill(picture(state(number % 7)))
    assert (process.num_fds(), archive.path.stat().st_size) == (num_files, size)
    assert process.memory_info().rss - resident < 8 << 20
    archive.close()


def test_the_copy_in_the_file_outlives_the_mapping(tmp_path: Path) -> None:
    archive = Archive(tmp_path / "file.pt", picture(state(4)))
    archive.fill(picture(state(4)))
    archive.close()
    assert_same(torch.load(archive.path), state(4))


def test_a_storage_is_seen_as_its_bytes() -> None:
    tensor = torch.arange(6, dtype=torch.int16)[2:]
    assert np.array_equal(as_bytes(tensor.untyped_storage()).numpy().view(np.int16), np.arange(6, dtype=np.int16))
