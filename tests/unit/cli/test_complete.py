"""What the shell is told when Tab is pressed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from resilience.testing import FakeRun

PROGRAM = "import sys; from resilience.cli.main import main; sys.exit(main())"


def offered(line: str) -> list[str]:
    """What bash would offer for the last word of `line`."""
    words = line.split(" ")
    asked = {"_RESILIENCE_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env={**os.environ, **asked}, capture_output=True, text=True, timeout=60
    )
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.usefixtures("ended")
@pytest.mark.parametrize(
    ("line", "offers"),
    [
        ("resilience sta", ["status"]),
        ("resilience checkpoints ver", ["verify"]),
        ("resilience top --inte", ["--interval"]),
        ("resilience explain g1-s3", ["g1-s3-a1", "g1-s3-a0"]),
        ("resilience cordon dev", ["device-0", "device-1"]),
        ("resilience cordon a", ["a"]),
        ("resilience status --run-dir resilience-runs/2026", ["resilience-runs/20260101-000000-1"]),
        ("resilience report la", ["latest"]),
        ("resilience explain --run-dir nowhere g", []),
        ("resilience explain --address 127.0.0.1:9 g", []),
    ],
)
def test_offers(line: str, offers: list[str]) -> None:
    assert offered(line) == offers


def test_where_there_is_no_run_nothing_is_offered(here: Path) -> None:
    assert offered("resilience explain g") == []
    assert offered("resilience report 2") == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_for_a_shell_is_shown(here: Path, shell: str) -> None:
    environment = {**os.environ, "_RESILIENCE_COMPLETE": f"source_{shell}"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=60)
    assert f"complete_{shell}" in done.stdout


def test_a_shell_that_is_asked_in_earnest(ended: FakeRun, here: Path) -> None:
    """Bash itself, with the script that `--show-completion` prints."""
    del ended
    (here / "resilience").write_text(f"#!{sys.executable}\n{PROGRAM}\n")
    (here / "resilience").chmod(0o755)
    script = """
    eval "$(_RESILIENCE_COMPLETE=source_bash resilience)"
    COMP_WORDS=(resilience explain g1-s2); COMP_CWORD=2
    $(complete -p resilience | sed -E 's/.*-F ([^ ]+).*/\\1/') resilience
    echo "${COMPREPLY[@]}"
    """
    path = os.pathsep.join([str(here), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "--norc", "-c", script], env={**os.environ, "PATH": path}, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.split() == ["g1-s2-a0"], done.stderr
