"""Only this run's buffers are removed from shared memory."""

from __future__ import annotations

import os
from pathlib import Path

from resilience.launch.shared_memory import remove_buffers

UID = os.getuid()


def test_only_this_users_address_and_port_are_removed(tmp_path: Path) -> None:
    mine = [f"deepspeed_allreduce_buffer_{UID}_127.0.0.1_29600_{rank}" for rank in (0, 11)]
    others = [
        f"deepspeed_allreduce_buffer_{UID + 1}_127.0.0.1_29600_0",
        f"deepspeed_allreduce_buffer_{UID}_127.0.0.2_29600_0",
        f"deepspeed_allreduce_buffer_{UID}_127.0.0.1_2960_0",
        f"deepspeed_allreduce_buffer_{UID}_127.0.0.1_29600_x",
        "psm_1234",
    ]
    for name in mine + others:
        (tmp_path / name).touch()
    assert remove_buffers([("127.0.0.1", 29600)], directory=tmp_path) == sorted(mine)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(others)


def test_no_endpoint_removes_nothing(tmp_path: Path) -> None:
    (tmp_path / "deepspeed_allreduce_buffer_0_a_1_0").touch()
    assert remove_buffers([], directory=tmp_path) == []
