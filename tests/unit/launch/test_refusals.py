"""Everything that a person can get wrong in a launch: one line that names the thing and the fix, and the right code."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """The answers to all mistakes, from one process: importing DeepSpeed is what takes the time."""
    place = tmp_path_factory.mktemp("place")
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        (place / "busy.toml").write_text(f"[coordinator]\nport = {port}\n")
        (place / "metrics.toml").write_text(f"[coordinator]\nmetrics_port = {port}\n")
        (place / "typo.yaml").write_text("policy:\n  max_restart: 3\n")
        (place / "away.json").write_text('{"coordinator": {"address": "127.0.0.1:1"}}')
        (place / "spares.toml").write_text("[launch]\nnum_spare_nodes = 2\n")
        (place / "faults.toml").write_text('[[fault]]\nstep = 1\nrank = 0\nsite = "linear.output"\nkind = "inf"\n')
        (place / "file").touch()
        (place / "hostfile").write_text("worker-0 slots=1\nworker-1 slots=1\n")
        two = ["--hostfile", "hostfile", "--master_addr", "127.0.0.1", "--no_ssh"]
        mistakes = {
            "misspelt": ["--resilience", "--resilience-fualts=faults.toml"],
            "no number": ["--resilience", "--num_gpus", "two"],
            "without": ["--resilience-dir", "x"],
            "launcher": ["--resilience", "--launcher", "openmpi"],
            "busy": ["--resilience", "--resilience-config", "busy.toml"],
            "metrics": ["--resilience", "--resilience-config", "metrics.toml"],
            "typo": ["--resilience", "--resilience-config", "typo.yaml"],
            "absent": ["--resilience", "--resilience-config", "absent.toml"],
            "faults": ["--resilience", "--resilience-faults", "faults.toml"],
            "unwritable": ["--resilience", "--resilience-dir", "file/run"],
            "away": ["--resilience", "--resilience-config", "away.json"],
            "spares": ["--resilience", *two, "--node_rank", "0", "--resilience-config", "spares.toml"],
            "spare alone": ["--resilience", "--resilience-config", "spares.toml"],
            "lost": ["--resilience", *two, "--node_rank", "1"],
        }
        answer = subprocess.run(
            [sys.executable, str(Path(__file__).with_name("refusals.py"))],
            input="".join(json.dumps([*words, "train.py"]) + "\n" for words in mistakes.values()),
            capture_output=True,
            text=True,
            cwd=place,
            check=False,
        )
    assert answer.returncode == 0, answer.stderr
    found = [json.loads(line[7:]) for line in answer.stdout.splitlines() if line.startswith("ANSWER ")]
    yield dict(zip(mistakes, found, strict=True))
    assert not (place / "resilience-runs").exists(), "a refused launch must not leave a run directory"


@pytest.mark.parametrize(
    ("mistake", "code", "words"),
    [
        ("misspelt", 64, ["--resilience-fualts=faults.toml", "did you mean --resilience-faults?"]),
        ("no number", 64, ["--num_gpus", "'two'"]),
        ("without", 64, ["--resilience-dir x", "add --resilience"]),
        ("launcher", 64, ["--launcher openmpi", "pdsh", "--no_ssh --node_rank"]),
        ("busy", 64, ["coordinator.port", "in use"]),
        ("metrics", 64, ["coordinator.metrics_port", "in use"]),
        ("typo", 64, ["typo.yaml", "max_restart", "did you mean 'max_restarts'"]),
        ("absent", 64, ["absent.toml", "cannot be read"]),
        ("faults", 64, ["faults.toml", "linear.output"]),
        ("unwritable", 64, ["file/run", "cannot be written"]),
        ("away", 69, ["127.0.0.1:1", "no answer"]),
        ("spares", 64, ["launch.num_spare_nodes = 2", "of 2 in all", "to 1 at most", "--hostfile"]),
        ("spare alone", 64, ["launch.num_spare_nodes = 2", "of 1 in all", "to 0 at most"]),
        ("lost", 64, ["--resilience-dir", "coordinator.address", "launch.run_id"]),
    ],
)
def test_a_mistake_gets_one_line_and_its_code(
    answers: dict[str, Any], mistake: str, code: int, words: list[str]
) -> None:
    found, said = answers[mistake]
    ours = [line for line in said.splitlines() if line.startswith("resilience: ")]
    assert found == code, said
    assert len(ours) == 1, said
    for word in words:
        assert word in ours[0]
    assert "Traceback" not in said
