"""A guardian that storage or the system fails: its agent and the arena outlive it, and the reason is said."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest

from resilience.context import RunContext
from resilience.events import SnapshotFact, SnapshotKind
from resilience.launch import guardian as guardian_module
from resilience.launch.guardian import Guardian
from resilience.launch.run_directory import RunDirectory
from resilience.rpc.v1 import coordinator_pb2 as pb
from resilience.snapshot import arena as arenas
from resilience.snapshot.arena import Arena
from resilience.snapshot.orders import Answer, Begin, Settle, encode, read, write
from tests.nodes import run_context


class Kept:
    """An agent's side of a guardian that was not started yet."""

    def __init__(self, tmp_path: Path) -> None:
        self.context: RunContext = run_context(tmp_path)
        RunDirectory(tmp_path).logs.mkdir()
        self.context.write(tmp_path / "context.json")
        self.arena, held = arenas.make(tmp_path, run_id="run", node="here", run_dir=tmp_path)
        self.facts: list[SnapshotFact] = []
        self.guardian = Guardian(
            self.arena, held, self.context, tmp_path / "context.json", node="here", num_nodes=1, tell=self.facts.append
        )


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Kept]:
    made = Kept(tmp_path)
    yield made
    made.guardian.stop()
    assert not made.arena.path.exists()


def test_one_that_cannot_be_started_costs_no_rank(
    kept: Kept, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tries: list[Any] = []

    def refused(*arguments: object, **_: object) -> NoReturn:
        tries.append(arguments)
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "Popen", refused)
    kept.guardian.keep_alive()
    kept.guardian.keep_alive()
    assert len(tries) == 2, "it is tried again"
    assert "the guardian cannot be started ([Errno 11] Resource temporarily unavailable)" in capsys.readouterr().err
    assert kept.guardian.pid is None
    assert kept.guardian.begin(pb.Assignment(generation=1), interrupted=lambda: None) == "", "training goes on"
    assert kept.arena.path.exists()


def test_a_log_that_cannot_be_written_costs_no_rank(kept: Kept, capsys: pytest.CaptureFixture[str]) -> None:
    RunDirectory(kept.context.run_dir).logs.rmdir()
    kept.guardian.keep_alive()
    assert "the guardian cannot be started ([Errno 2]" in capsys.readouterr().err


def test_what_is_told_again_is_passed_on_once_and_what_was_taken_again_as_well(kept: Kept) -> None:
    def fact(step: int, *, at: float, kind: SnapshotKind = SnapshotKind.TAKEN) -> SnapshotFact:
        return SnapshotFact(kind=kind, step=step, generation=1, node="here", at=at)

    class Process:
        stdout = io.BytesIO(
            b"".join(
                map(
                    write,
                    [
                        fact(3, at=1.0),
                        fact(3, at=1.0),  # by the next guardian, which found it in the arena
                        fact(3, at=2.0),  # after a rewind
                        *(fact(step, at=1.0) for step in range(10, 10 + 2 * guardian_module._MAX_TOLD)),
                    ],
                )
            )
            + b'{"torn'
        )

    kept.guardian._listen(Process())  # type: ignore[arg-type]  # what it uses of a process
    assert [(each.step, each.at) for each in kept.facts[:3]] == [(3, 1.0), (3, 2.0), (10, 1.0)]
    assert len(kept.guardian._told) == guardian_module._MAX_TOLD, "memory is bounded, however long the run"


def start(kept: Kept) -> subprocess.Popen[bytes]:
    arguments = ["--context", str(kept.context.run_dir / "context.json"), "--arena", str(kept.arena.path)]
    return subprocess.Popen(
        [sys.executable, "-m", "resilience.snapshot.guardian", *arguments, "--node", "here"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "XDG_STATE_HOME": str(kept.context.run_dir)},
    )


def ask(process: subprocess.Popen[bytes], order: Begin | Settle, number: int) -> Answer:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(encode(order, number=number))
    process.stdin.flush()
    while True:
        said = read(process.stdout.readline())
        if isinstance(said, Answer):
            assert said.number == number
            return said


def test_one_that_cannot_write_ends_with_a_line_and_leaves_the_arena(kept: Kept) -> None:
    kept.arena.guardian.mkdir()  # nothing can be written there
    process = start(kept)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 1
    (line,) = said.decode().splitlines()
    assert line.startswith("resilience: guardian: ")
    assert "guardian.json" in line
    assert kept.arena.path.exists(), "ranks train on in it, and the next guardian takes it up"


def test_a_generation_that_cannot_be_written_down_is_answered_with_the_reason(kept: Kept) -> None:
    kept.arena.generation.mkdir()
    process = start(kept)
    try:
        order = Begin(generation=1, world_size=1, ranks=(0,), peers=(), source=None)
        assert "generation 1 cannot be prepared" in ask(process, order, 1).problem
        assert ask(process, Settle(timeout_s=5.0), 2).problem == "", "it lives on"
        kept.arena.generation.rmdir()
        assert ask(process, order, 3).problem == ""
    finally:
        _, said = process.communicate(timeout=30)
    assert said.decode().count("cannot be prepared") == 1
    assert not Arena(kept.arena.path).path.exists(), "its agent closed the stream: the run is over"
