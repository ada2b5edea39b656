"""Archives whose entries were written in place, mended."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import pytest
import torch

from resilience.snapshot.crc import mend_crcs


def write_in_place(path: Path, at: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(content)


@pytest.mark.parametrize("writer", ["torch", "zipfile"])
def test_what_was_written_in_place_passes_the_test_of_zips(tmp_path: Path, writer: str) -> None:
    path, payload = tmp_path / "x.pt", bytes(range(256)) * 64
    if writer == "torch":
        torch.save({"a": torch.zeros(4096, dtype=torch.int32), "b": torch.ones(3)}, path)
        at = torch._C.PyTorchFileReader(str(path)).get_record_offset("data/0")  # type: ignore[attr-defined]
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("first", b"x" * len(payload))
            archive.writestr("second", b"")
            at = 30 + len("first")
    write_in_place(path, at, payload)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is not None, "nothing to mend"
    assert mend_crcs(path)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    if writer == "torch":
        assert torch.load(path)["a"].numpy().tobytes() == payload


def test_a_data_descriptor_is_mended_too(tmp_path: Path) -> None:
    path = tmp_path / "x"

    class Stream:
        """Cannot be gone back in, so that CRCs come behind the bytes."""

        def __init__(self) -> None:
            self.file = path.open("wb")

        def write(self, content: bytes) -> int:
            return self.file.write(content)

        def flush(self) -> None:
            self.file.flush()

    stream = Stream()
    with zipfile.ZipFile(stream, "w") as archive:  # type: ignore[arg-type]
        archive.writestr("first", b"x" * 100)
        archive.writestr("second", b"y" * 10)
    stream.file.close()
    write_in_place(path, 30 + len("first"), b"z" * 100)
    assert mend_crcs(path)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert archive.read("first") == b"z" * 100
        at = archive.getinfo("first").header_offset + 30 + 5 + 100
    content = path.read_bytes()
    assert content[at : at + 4] == b"PK\x07\x08"
    assert int.from_bytes(content[at + 4 : at + 8], "little") == zlib.crc32(b"z" * 100)


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    for content in (b"", b"no zip at all"):
        (tmp_path / "x").write_bytes(content)
        assert not mend_crcs(tmp_path / "x")
        assert (tmp_path / "x").read_bytes() == content
