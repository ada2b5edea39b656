"""The code that a process ends with is known before its interpreter shuts down, however it ends."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from resilience.guard.ending import code_of

SCRIPT = """
import os, sys, threading
from resilience.guard.ending import Ending
Ending(lambda code, why: print(code, why, flush=True)).watch()
"""


def said(tmp_path: Path, code: str, *, as_module: bool = False) -> tuple[str, int]:
    (tmp_path / "script.py").write_text(SCRIPT + code)
    command = ["-m", "script"] if as_module else ["script.py"]
    ended = subprocess.run(
        [sys.executable, *command], cwd=tmp_path, timeout=60, check=False, stdout=subprocess.PIPE, text=True
    )
    return ended.stdout.strip(), ended.returncode


@pytest.mark.parametrize("as_module", [False, True])
@pytest.mark.parametrize(
    ("code", "noted", "returned"),
    [
        ("pass", "0 the script ended", 0),
        ("sys.exit()", "0 the script ended", 0),
        ("sys.exit(75)", "75 the script ended", 75),
        ("exit(3)", "3 the script ended", 3),
        ("def main():\n    sys.exit('no')\nmain()", "1 the script ended", 1),
        ("raise SystemExit(3)", "None the script ended", 3),
        ("raise ValueError('bad batch')", "1 ValueError: bad batch", 1),
        ("try:\n    sys.exit(2)\nexcept SystemExit:\n    pass", "0 the script ended", 0),
        ("t = threading.Thread(target=sys.exit, args=(4,))\nt.start()\nt.join()", "0 the script ended", 0),
        ("if os.fork() == 0:\n    sys.exit(5)\nos.wait()", "0 the script ended", 0),
    ],
)
def test_the_code_is_noted(tmp_path: Path, code: str, noted: str, returned: int, as_module: bool) -> None:
    assert said(tmp_path, code, as_module=as_module) == (noted, returned)


@pytest.mark.parametrize(("status", "code"), [(None, 0), (0, 0), (True, 1), (93, 93), (-1, 255), ("text", 1), ("", 1)])
def test_code_of_a_status(status: object, code: int) -> None:
    assert code_of(status) == code
