"""The trail on disk: one frame for each optimizer step, each with its own checksum. No torch, no engine.

    frame    = JSON's length (u32) · blob's length (u32) · XXH3-64 of JSON and blob (u64) · JSON · blob
    JSON     {"step", "events": […], …}, in which `[offset, size]` pairs name bytes of the blob
    the end  a frame {"off": reason}: nothing is written after it

A process that is killed in mid-write leaves a torn frame at the end, which the next writer cuts off.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from typing import Any

import xxhash

from resilience.errors import SnapshotError

__all__ = ["Blob", "frame", "read_frames"]

_HEAD = struct.Struct("<IIQ")


class Blob:
    """The bytes of a frame that is being written."""

    def __init__(self) -> None:
        self._content = bytearray()

    def put(self, content: bytes) -> list[int]:
        """Add bytes; returns where they are, for the JSON."""
        place = [len(self._content), len(content)]
        self._content += content
        return place

    def __bytes__(self) -> bytes:
        return bytes(self._content)


def frame(body: dict[str, Any], blob: bytes = b"") -> bytes:
    """One frame, as it is appended to the file."""
    text = json.dumps(body, separators=(",", ":")).encode()
    checksum = xxhash.xxh3_64_intdigest(text + blob)
    return _HEAD.pack(len(text), len(blob), checksum) + text + blob


def read_frames(content: bytes, *, source: str) -> Iterator[tuple[dict[str, Any], bytes]]:
    """The frames of a whole trail, in their order: (JSON, blob).

    Args:
        content: the first so many bytes of a trail, up to the end of a frame.
        source: what to call it in an error.

    Raises:
        SnapshotError: it ends within a frame, or a frame's checksum differs.
    """
    offset = 0
    while offset < len(content):
        if offset + _HEAD.size > len(content):
            raise SnapshotError(f"{source}: ends in the middle of a frame, at byte {offset}")
        num_text, num_blob, checksum = _HEAD.unpack_from(content, offset)
        start = offset + _HEAD.size
        body = content[start : start + num_text + num_blob]
        if len(body) != num_text + num_blob:
            raise SnapshotError(f"{source}: ends in the middle of a frame, at byte {offset}")
        if xxhash.xxh3_64_intdigest(body) != checksum:
            raise SnapshotError(f"{source}: damaged (the checksum of the frame at byte {offset} differs)")
        yield json.loads(body[:num_text]), body[num_text:]
        offset = start + len(body)
