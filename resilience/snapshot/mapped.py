"""Reads a prepared file without copying it: tensors lie in a private mapping until they are copied to their places.

Reading into fresh memory costs more than all else of a restore: the kernel must find and clear each page first. What
is mapped instead must not outlive the file's slot, which is overwritten later: `close` tells where anything still
refers to the mapping, whoever holds it. Never here: whether the file may be unpickled; digests answer that before.
"""

from __future__ import annotations

import contextlib
import gc
import io
import mmap
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch

__all__ = ["Mapped"]

_MADV_POPULATE_READ = 22
"""Linux 5.14; before, each page is mapped when it is read first."""


class Mapped:
    """One file, mapped. Changes to its tensors never reach the file.

    Args:
        path: written by `resilience.snapshot.archive`, and verified.
    """

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        with contextlib.suppress(OSError):
            self._map.madvise(_MADV_POPULATE_READ)
        self._reader: Any = torch._C.PyTorchFileReader(str(path))

    def read(self) -> Any:
        """What was saved; its tensors lie on the CPU, in the mapping."""
        return _Unpickler(self._reader, np.frombuffer(self._map, dtype=np.uint8)).load()

    def close(self) -> bool:
        """Let the mapping go; False where something still lies in it, and it cannot go."""
        for collect in (lambda: None, gc.collect):
            collect()
            with contextlib.suppress(BufferError):
                self._map.close()
                return True
        return False

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor lies in the mapping."""
        begin = np.frombuffer(self._map, dtype=np.uint8).ctypes.data
        return begin <= tensor.data_ptr() < begin + len(self._map) and tensor.device.type == "cpu"


class _Unpickler(pickle.Unpickler):
    """Reads what `torch.save` writes, from the places of its records."""

    def __init__(self, reader: Any, content: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
        super().__init__(io.BytesIO(reader.get_record("data.pkl")))
        self._reader = reader
        self._content = content
        self._storages: dict[str, torch.UntypedStorage] = {}

    def persistent_load(self, pid: Any) -> Any:
        _, storage_type, key, _, count = pid
        dtype = torch.uint8 if storage_type is torch.UntypedStorage else storage_type._dtype
        if key not in self._storages:
            self._storages[key] = self._storage(f"data/{key}", count * dtype.itemsize)
        storage = self._storages[key]
        return torch.storage.TypedStorage(wrap_storage=storage, dtype=dtype, _internal=True)  # type: ignore[no-untyped-call]

    def _storage(self, name: str, num_bytes: int) -> torch.UntypedStorage:
        if not num_bytes:
            return torch.UntypedStorage(0)  # type: ignore[no-untyped-call]
        offset = self._reader.get_record_offset(name)
        return torch.from_numpy(self._content[offset : offset + num_bytes]).untyped_storage()
