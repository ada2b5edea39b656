"""What DeepSpeed's CPU all-reduce leaves in /dev/shm, and its removal for the ports of one run.

DeepSpeed creates one object for each rank, `deepspeed_allreduce_buffer_<uid>_<MASTER_ADDR>_<MASTER_PORT>_<rank>`
(csrc/cpu/comm/shm.cpp, `shm_initialize`), 66 MiB each, and never unlinks it. Nothing else may ever be removed here.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

__all__ = ["remove_buffers"]

SHARED_MEMORY = Path("/dev/shm")


def remove_buffers(endpoints: Iterable[tuple[str, int]], *, directory: Path = SHARED_MEMORY) -> list[str]:
    """Remove the buffers of this user for these (MASTER_ADDR, MASTER_PORT) pairs. Call it when their ranks have ended.

    Returns:
        The names that were removed.
    """
    prefixes = tuple(f"deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_" for address, port in endpoints)
    if not prefixes or not directory.is_dir():
        return []
    removed = []
    for entry in directory.iterdir():
        if not entry.name.startswith(prefixes) or not entry.name.rpartition("_")[2].isdigit():
            continue
        entry.unlink(missing_ok=True)
        removed.append(entry.name)
    return sorted(removed)
