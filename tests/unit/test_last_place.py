"""The last place of a rank is what it was told last, even after a `kill -9`."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

from resilience.last_place import LastPlace, Place, path_of, read_end, read_place

RANK = """
import os, signal, sys
from pathlib import Path
from resilience.last_place import LastPlace
place = LastPlace(Path(sys.argv[1]))
for step in range(1, 8):
    place.begin(step, 1, 2)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_survives_a_kill(tmp_path: Path) -> None:
    path = path_of(tmp_path, 3, 1)
    ended = subprocess.run([sys.executable, "-c", RANK, str(path)], timeout=60, check=False)
    assert ended.returncode == -signal.SIGKILL
    assert read_place(path) == Place(step=7, micro_step=1, attempt=2)


def test_no_place_before_the_first_micro_step(tmp_path: Path) -> None:
    assert read_place(tmp_path / "missing") is None
    LastPlace(tmp_path / "rank-0.place")
    assert read_place(tmp_path / "rank-0.place") is None
    (tmp_path / "torn").write_bytes(b"123")
    assert read_place(tmp_path / "torn") is None


def test_the_end_is_kept_beside_the_place(tmp_path: Path) -> None:
    path = tmp_path / "rank-0.place"
    assert read_end(path) is None
    place = LastPlace(path)
    place.begin(7, 1, 2)
    assert read_end(path) is None
    place.end(0)
    assert read_end(path) == 0
    place.end(93)
    assert (read_end(path), read_place(path)) == (93, Place(step=7, micro_step=1, attempt=2))
