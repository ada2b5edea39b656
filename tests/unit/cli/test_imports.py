"""What starting the command imports: help, and verbs that read files, do without what takes long. No stop-watch: what
is in `sys.modules` says it, the same on every machine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from resilience.cli.examples import verbs
from resilience.cli.main import app

HEAVY = ("torch", "deepspeed", "numpy", "grpc", "google.protobuf", "asyncio", "psutil", "prometheus_client")
PROGRAM = """
import sys, json
from resilience.cli.main import main
code = main(sys.argv[1:])
print(json.dumps({"code": code, "modules": sorted(sys.modules)}), file=sys.stderr)
"""


def started(here: Path, *arguments: str) -> tuple[int, set[str]]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, check=False, timeout=60, cwd=here
    )
    told = json.loads(done.stderr.splitlines()[-1])
    return told["code"], set(told["modules"])


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["checkpoints", "verify", "--help"], 0),
        (["nonsense"], 64),
        (["policy", "show"], 0),
        (["policy", "simulate", "--mended", "--json"], 0),
        (["policy", "check", "settings.toml"], 0),
        (["checkpoints", "list", "ck", "--json"], 0),
        (["checkpoints", "verify", "ck"], 0),
        (["checkpoints", "prune", "ck", "--dry-run"], 0),
        (["digest", "nowhere"], 1),
        (["calibrate"], 64),
    ],
    ids=lambda value: value if isinstance(value, int) else " ".join(value),
)
def test_what_asks_nobody_imports_neither_torch_nor_grpc(here: Path, arguments: list[str], code: int) -> None:
    (here / "ck" / "step1").mkdir(parents=True)
    (here / "ck" / "step1" / "mp_rank_00_model_states.pt").write_bytes(b"weights")
    (here / "settings.toml").write_text("[policy]\nmax_restarts = 7\n")
    found, modules = started(here, *arguments)
    assert found == code
    assert [name for name in HEAVY if name in modules] == []


def test_loading_every_verb_imports_nothing_but_typer(here: Path) -> None:
    """Neither rich nor pydantic: they are for who prints a table or reads a configuration."""
    program = "import sys, resilience.cli.main; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert [name for name in (*HEAVY, "rich", "pydantic", "yaml") if name in modules] == []
    assert len(list(verbs(app))) > 25


@pytest.mark.parametrize("verb", ["status", "ranks --json"])
def test_asking_a_coordinator_imports_no_machine_and_no_configuration(here: Path, verb: str) -> None:
    code, modules = started(here, *verb.split(), "--address", "127.0.0.1:9")
    assert code == 69
    assert "grpc" in modules
    # pydantic is there, because typer reads options with it.
    unneeded = ("torch", "numpy", "prometheus_client", "resilience.config", "resilience.coordinator.machine")
    assert [name for name in unneeded if name in modules] == []
