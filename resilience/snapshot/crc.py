"""Mends the CRCs of a zip archive whose entries were written in place, so that tools which look at them accept it.

torch does not look at them; `zipfile`, `unzip -t` and whoever archives checkpoints do. Entries are stored, as torch
stores them, so that their bytes are where the archive says.
"""

from __future__ import annotations

import mmap
import struct
import zipfile
import zlib
from pathlib import Path

__all__ = ["mend_crcs"]

_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_CRC_IN_LOCAL, _CRC_IN_CENTRAL = 14, 16
_HAS_DESCRIPTOR = 1 << 3
_DESCRIPTOR_SIGNATURE = b"PK\x07\x08"
_CHUNK_BYTES = 1 << 22


def mend_crcs(path: Path) -> bool:
    """Write into a zip what the CRCs of its entries are; False for a file that is none.

    Raises:
        OSError: it cannot be written.
    """
    if path.stat().st_size == 0 or not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        entries, place = archive.infolist(), archive.start_dir
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as content:
        for entry in entries:
            place = _mend(content, entry, place)
    return True


def _mend(content: mmap.mmap, entry: zipfile.ZipInfo, place: int) -> int:
    """Mend one entry, whose record in the directory is at `place`; the place of the next one."""
    local = _LOCAL.unpack_from(content, entry.header_offset)
    start = entry.header_offset + _LOCAL.size + local[9] + local[10]
    end = start + entry.file_size
    crc = 0
    with memoryview(content) as view:
        for at in range(start, end, _CHUNK_BYTES):
            crc = zlib.crc32(view[at : min(at + _CHUNK_BYTES, end)], crc)
    struct.pack_into("<I", content, place + _CRC_IN_CENTRAL, crc)
    if entry.flag_bits & _HAS_DESCRIPTOR:
        signature = len(_DESCRIPTOR_SIGNATURE) if content[end : end + 4] == _DESCRIPTOR_SIGNATURE else 0
        struct.pack_into("<I", content, end + signature, crc)
    else:
        struct.pack_into("<I", content, entry.header_offset + _CRC_IN_LOCAL, crc)
    central = _CENTRAL.unpack_from(content, place)
    return place + _CENTRAL.size + int(central[10]) + int(central[11]) + int(central[12])
