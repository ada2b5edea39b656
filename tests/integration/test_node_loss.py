"""Nodes that vanish with their agent, guardian, ranks and memory; a spare one takes over what the others can rebuild.

The nodes are sessions of this machine, each with an arena of its own. The weights must end as those of a plain run.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.integration.harness import DEEPSPEED_CONFIG, Run, digest, launched, wait_for
from tests.integration.test_launch_nodes import PDSH

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(900)]

IN_CI = (2, 2, "bf16")
"""Nodes, ZeRO stage and type of the case that always runs; the others take an hour."""

CONFIG = """
[snapshot]
dir = "{arenas}"
interval_steps = 2
parity_losses = {losses}
[coordinator]
lease_s = 4.0
[launch]
num_spare_nodes = {losses}
warm_standby = false
"""


@pytest.fixture
def arenas() -> Iterator[Path]:
    """A folder on tmpfs."""
    path = Path(tempfile.mkdtemp(prefix="resilience-nodes-", dir="/dev/shm"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


def configuration(stage: int, dtype: str) -> dict[str, Any]:
    config = {key: value for key, value in DEEPSPEED_CONFIG.items() if key != "bf16"}
    config |= {"zero_optimization": {"stage": stage}, "gradient_accumulation_steps": 1}
    return config | ({"bf16": {"enabled": True}} if dtype == "bf16" else {})


def options(
    tmp_path: Path, arenas: Path, monkeypatch: pytest.MonkeyPatch, *, num_nodes: int, losses: int, steps: int
) -> dict[str, Any]:
    """For a launch on nodes of one device each, as many of them spare as can be lost."""
    hosts = "".join(f"worker-{n} slots=1\n" for n in range(num_nodes + losses))
    (tmp_path / "hostfile").write_text(hosts)
    binaries = tmp_path / "bin"
    binaries.mkdir()
    (binaries / "pdsh").write_text(PDSH)
    (binaries / "pdsh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{binaries}:{os.environ['PATH']}")
    return {
        "launch_args": ["--hostfile", str(tmp_path / "hostfile"), "--num_gpus", "1", "--master_addr", "127.0.0.1",
                        "--no_ssh_check"],
        "script_args": ["--steps", str(steps), "--save-every", str(steps)],
        "resilience": CONFIG.format(arenas=arenas, losses=losses),
    }  # fmt: skip


def arena_of(arenas: Path, node: str) -> Path:
    return next(path for path in arenas.iterdir() if path.name.endswith(f"-{node}"))


def lose(run: Run, arenas: Path, node: str) -> None:
    """Everything of a node at once, its memory included."""
    arena = arena_of(arenas, node)
    guardian = run.find("resilience.snapshot.guardian", str(arena))
    agent = guardian.parent()
    assert agent is not None
    victims = [agent, *agent.children(recursive=True)]
    for victim in victims:
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.kill()
    psutil.wait_procs(victims, timeout=10)
    shutil.rmtree(arena, ignore_errors=True)  # the guardian may have had time to


def protected(arenas: Path, nodes: list[str]) -> bool:
    """Whether parity of a snapshot counts on all of these."""
    return all(list(arena_of(arenas, node).glob("peers/*/complete")) for node in nodes)


CASES = [
    pytest.param(
        num_nodes, losses, stage, dtype, marks=[] if (num_nodes, stage, dtype) == IN_CI else [pytest.mark.long]
    )
    for num_nodes, losses in ((2, 1), (6, 2))
    for stage in range(4)
    for dtype in ("fp32", "bf16")
]


@pytest.mark.parametrize(("num_nodes", "losses", "stage", "dtype"), CASES)
def test_lost_nodes_are_rebuilt_on_spare_ones(
    tmp_path: Path, arenas: Path, monkeypatch: pytest.MonkeyPatch, num_nodes: int, losses: int, stage: int, dtype: str
) -> None:
    steps = 40
    chosen = options(tmp_path, arenas, monkeypatch, num_nodes=num_nodes, losses=losses, steps=steps)
    chosen["deepspeed_config"] = configuration(stage, dtype)
    nodes = [f"worker-{n}" for n in range(num_nodes)]
    with launched(tmp_path / "lossy", **chosen) as run:
        run.wait_for_line("step 4 ", timeout_s=180)
        wait_for(lambda: protected(arenas, nodes), what="parity on all nodes")
        for node in nodes[1 : 1 + losses]:
            lose(run, arenas, node)
        assert run.wait(400) == 0, run.output()[-6000:]
        report = run.report()
        run.assert_nothing_left()
    assert not list(arenas.iterdir())
    assert 2 <= report["num_generations"] <= 1 + losses, "one for each loss, where they were not noticed together"
    assert "rebuilt from parity" in str(report["generations"][-1])
    plain = {key: chosen[key] for key in ("script_args", "deepspeed_config")}
    with launched(tmp_path / "plain", plain=True, launch_args=["--num_gpus", str(num_nodes)], **plain) as run:
        assert run.wait(400) == 0, run.output()[-4000:]
    assert digest(tmp_path / "lossy") == digest(tmp_path / "plain")
