"""A file that `torch.save` could have written, laid out once and filled in place from then on.

The zip archive of torch (`PyTorchFileWriter`) has one record with the pickle and one for the bytes of each storage. The
pickle's record is padded, for what follows its STOP is not read; so is its place, and that of every storage, the same
in each snapshot, and taking one is copying memory. `torch.load` reads the file as it is, with `weights_only` and `mmap`
too; only the CRCs of the zip are those of the first fill, and whoever publishes the file outside mends them.

Never here: what is saved, and when.
"""

from __future__ import annotations

import dataclasses
import io
import mmap
import os
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch.serialization import location_tag, normalize_storage_type

from resilience.errors import SnapshotError
from resilience.kernels.copying import copy_past_caches
from resilience.snapshot.copiers import Bytes, Copier, WaitingCopier
from resilience.snapshot.manifest import FileEntry, Record

__all__ = ["Archive", "Image", "as_bytes", "picture"]

_PROTOCOL = 2
_ROOM = 2.0
"""The pickle may grow by this factor before the file is laid out anew: counters and schedulers do grow."""
_ROOM_BYTES = 16 << 10
_ROUND_BYTES = 64 << 10
"""To a multiple of this: a process that takes over the files of another finds their pickles a few bytes longer."""
_AT_ONCE = WaitingCopier()


@dataclasses.dataclass(frozen=True, slots=True)
class Image:
    """What a file is to hold: the pickle, and live storages by the name of their record. Nothing is copied yet."""

    pickled: bytes
    storages: tuple[tuple[str, torch.UntypedStorage], ...]

    @property
    def sizes(self) -> tuple[tuple[str, int], ...]:
        return tuple((name, storage.nbytes()) for name, storage in self.storages)


class _Pickler(pickle.Pickler):
    """Writes what `torch.save` writes, and notes the storages."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=_PROTOCOL)
        self.storages: dict[int, tuple[str, torch.UntypedStorage]] = {}

    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, torch.storage.TypedStorage):
            storage = obj._untyped_storage
            storage_type = getattr(torch, obj._pickle_storage_type())  # type: ignore[no-untyped-call]
            size = obj._size()  # type: ignore[no-untyped-call]
        elif isinstance(obj, torch.UntypedStorage):
            storage, storage_type, size = obj, _storage_type(obj), obj.nbytes()
        else:
            return None
        # By its address in torch, not in memory: empty storages have none.
        name, _ = self.storages.setdefault(storage._cdata, (str(len(self.storages)), storage))
        return "storage", storage_type, name, location_tag(storage), size


def _storage_type(storage: torch.UntypedStorage) -> Any:
    return normalize_storage_type(type(storage))  # type: ignore[no-untyped-call]


def picture(value: Any) -> Image:
    """What `torch.save(value, …)` would write."""
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(value)
    return Image(file.getvalue(), tuple((f"data/{name}", storage) for name, storage in pickler.storages.values()))


def as_bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    """The bytes of a storage as a uint8 tensor on its device; it aliases the storage."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


class Archive:
    """One prepared file. Where a file of the same layout is there, of a process that ended, it is taken over: giving a
    new one its memory takes several times as long as filling it.

    Args:
        path: of the file; its folder exists. Nobody else may be writing to it.
        image: what it will hold first; sizes of storages are fixed with it.

    Raises:
        SnapshotError: there is no room for it.
    """

    def __init__(self, path: Path, image: Image) -> None:
        self.path = path
        self._sizes = image.sizes
        room = int(len(image.pickled) * _ROOM) + _ROOM_BYTES
        self._capacity = -(-room // _ROUND_BYTES) * _ROUND_BYTES
        try:
            self._pickle_at, self._records = _lay_out(path, self._capacity, self._sizes)
        except (OSError, RuntimeError) as error:
            path.unlink(missing_ok=True)
            raise SnapshotError(f"{path}: cannot be laid out ({error}); is the file system full?") from None
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0))
        self._bytes = np.frombuffer(self._map, dtype=np.uint8)

    def fits(self, image: Image) -> bool:
        """Whether the file can hold this without being laid out anew."""
        return image.sizes == self._sizes and len(image.pickled) <= self._capacity

    @property
    def memory(self) -> Bytes:
        """The mapped file, (n,) uint8."""
        return self._bytes

    def fill(self, image: Image, copier: Copier = _AT_ONCE) -> FileEntry:
        """Copy everything in, what lies on a device by way of `copier`; what the file holds then, without digests."""
        assert self.fits(image), "lay it out anew"
        pickled = np.frombuffer(image.pickled, dtype=np.uint8)
        self._bytes[self._pickle_at : self._pickle_at + len(pickled)] = pickled
        storages = dict(image.storages)
        for record in self._records:
            target = self._bytes[record.offset : record.offset + record.size]
            source = as_bytes(storages[record.name])
            if copier.serves(source):
                copier.copy(target, source)
            else:
                copy_past_caches(target, source.numpy())
        return FileEntry(path="", size=len(self._bytes), records=self._records)

    def close(self) -> None:
        """Let the mapping go; the file stays."""
        self._bytes = np.empty(0, dtype=np.uint8)
        self._map.close()


def _lay_out(path: Path, capacity: int, sizes: Sequence[tuple[str, int]]) -> tuple[int, tuple[Record, ...]]:
    """See that the file is there with all its records, their bytes not set yet, and has its memory.

    Returns:
        Where its pickle begins, and its records.
    """
    new = path.with_suffix(".new")
    new.unlink(missing_ok=True)
    try:
        places = _write_empty(new, capacity, sizes)
        if not _is_laid_out(path, new, *places, capacity):
            path.unlink(missing_ok=True)
            # Now, for a mapping of a file without memory would end the process (SIGBUS) instead of raising.
            with new.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
            new.rename(path)
    finally:
        new.unlink(missing_ok=True)
    return places


def _write_empty(path: Path, capacity: int, sizes: Sequence[tuple[str, int]]) -> tuple[int, tuple[Record, ...]]:
    """The file as torch lays it out, with holes in the place of the records."""
    writer: Any = torch._C.PyTorchFileWriter(str(path))  # torch's stubs lack some of its methods
    writer.write_record("data.pkl", b"\x00" * capacity, capacity)
    writer.write_record(".format_version", b"1", 1)
    writer.write_record(".storage_alignment", b"64", 2)
    writer.write_record("byteorder", b"little", 6)
    for name, size in sizes:
        writer.write_record_metadata(name, size)
    writer.write_end_of_file()
    del writer
    reader: Any = torch._C.PyTorchFileReader(str(path))
    records = (Record(name=name, offset=reader.get_record_offset(name), size=size) for name, size in sizes if size)
    return reader.get_record_offset("data.pkl"), tuple(sorted(records, key=lambda record: record.offset))


def _is_laid_out(path: Path, new: Path, pickle_at: int, records: Sequence[Record], capacity: int) -> bool:
    """Whether `path` is what `new` is, byte for byte outside of the pickle and the records, has its memory, and is in
    no other folder: what hangs in a restore folder, too, must stay what it is."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return False
    size = new.stat().st_size
    if found.st_nlink != 1 or found.st_size != size or found.st_blocks * 512 < size:
        return False
    ends = [pickle_at + capacity, *(record.offset + record.size for record in records)]
    begins = [*(record.offset for record in records), size]
    with path.open("rb") as one, new.open("rb") as other:
        return all(
            _read(one, *span) == _read(other, *span) for span in [(0, pickle_at), *zip(ends, begins, strict=True)]
        )


def _read(file: BinaryIO, begin: int, end: int) -> bytes:
    file.seek(begin)
    return file.read(end - begin)
