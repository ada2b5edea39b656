"""Snapshots copied by a stream beside the script's: what is in the files is the state at the end of the step."""

from __future__ import annotations

import json
import mmap
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from resilience.snapshot.copiers import Bytes, CudaStreams, StreamCopier
from tests.gpu.configs import ONE_GPU, config
from tests.gpu.waiting import no_waiting
from tests.integration.harness import digest, launched

pytestmark = pytest.mark.gpu

WORKER = Path(__file__).parent / "snapshot_rank.py"
MIB = 1 << 20
SIZE = 256 * MIB
KILL = '[[fault]]\nstep = 8\nrank = 0\nmicro_step = 1\nsite = "process"\nkind = "kill"\n'
EVERY_STEP = "[snapshot]\ninterval_steps = 1\n"
STAGES = [f"zero{stage}" for stage in (0, 1, 2, 3)]


class Mapping:
    """A file on tmpfs, mapped as slots are."""

    def __init__(self, path: Path, size: int) -> None:
        with path.open("w+b") as file:
            os.posix_fallocate(file.fileno(), 0, size)
            self._map = mmap.mmap(file.fileno(), size)
        path.unlink()
        self.bytes: Bytes = np.frombuffer(self._map, dtype=np.uint8)


@pytest.fixture
def memory() -> Bytes:
    return Mapping(Path("/dev/shm") / f"resilience-test-{os.getpid()}", SIZE).bytes


@pytest.fixture
def streams(cuda: torch.device) -> CudaStreams:
    return CudaStreams(cuda)


@pytest.fixture
def copier(streams: CudaStreams, memory: Bytes) -> Iterator[StreamCopier]:
    made = StreamCopier(streams)
    made.admit(memory)
    assert made.problem == ""
    yield made
    made.drop()
    made.release(memory)


def busy(device: torch.device) -> None:
    """Keep the script's stream at work for some time."""
    a = torch.randn(4096, 4096, device=device)
    for _ in range(40):
        a = (a @ a).clamp_(-1, 1)


def begin(copier: StreamCopier, memory: Bytes, weight: torch.Tensor, buffer: torch.Tensor) -> None:
    copier.begin(lambda: frozenset({weight.untyped_storage()._cdata}))
    copier.copy(memory[: len(weight)], weight)
    copier.copy(memory[len(weight) : len(weight) + len(buffer)], buffer)
    copier.seal()


def test_what_the_script_changes_after_the_snapshot_is_not_in_it(
    copier: StreamCopier, memory: Bytes, cuda: torch.device
) -> None:
    half = SIZE // 2
    for number in range(1, 6):
        weight = torch.full((half,), number, dtype=torch.uint8, device=cuda)
        buffer = torch.full((half,), number, dtype=torch.uint8, device=cuda)
        busy(cuda)
        begin(copier, memory, weight, buffer)
        buffer.fill_(99)  # as a forward does with statistics, at once and without waiting
        copier.go_on()
        busy(cuda)
        assert copier.finish()
        weight.fill_(99)  # as the optimizer does
        assert bool((memory == number).all())


def test_a_weight_that_changes_beneath_the_copy_is_told(
    copier: StreamCopier, memory: Bytes, cuda: torch.device
) -> None:
    weight = torch.ones(SIZE - MIB, dtype=torch.uint8, device=cuda)
    begin(copier, memory, weight, torch.ones(MIB, dtype=torch.uint8, device=cuda))
    copier.go_on()
    weight[12345:12346].fill_(2)
    assert not copier.finish()
    begin(copier, memory, weight, torch.ones(MIB, dtype=torch.uint8, device=cuda))
    copier.go_on()
    assert copier.finish()
    assert torch.equal(torch.from_numpy(memory[: len(weight)]), weight.cpu())


def test_no_call_before_the_end_waits_for_the_device(copier: StreamCopier, memory: Bytes, cuda: torch.device) -> None:
    weight = torch.ones(SIZE - MIB, dtype=torch.uint8, device=cuda)
    buffer = torch.ones(MIB, dtype=torch.uint8, device=cuda)
    for _ in range(2):  # kernels are compiled
        begin(copier, memory, weight, buffer)
        copier.go_on()
        copier.finish()
    with no_waiting():
        begin(copier, memory, weight, buffer)
        copier.go_on()
    assert copier.finish()


def test_memory_of_a_storage_that_the_script_lets_go_is_not_given_to_others(
    copier: StreamCopier, memory: Bytes, cuda: torch.device
) -> None:
    weight = torch.full((SIZE - MIB,), 3, dtype=torch.uint8, device=cuda)
    begin(copier, memory, weight, torch.full((MIB,), 3, dtype=torch.uint8, device=cuda))
    busy(cuda)
    copier.go_on()
    del weight
    others = [torch.full((SIZE - MIB,), 7, dtype=torch.uint8, device=cuda) for _ in range(2)]
    assert copier.finish()
    assert bool((memory == 3).all())
    del others


def test_a_refused_registration_leaves_no_error_for_the_next_kernel(
    streams: CudaStreams, memory: Bytes, cuda: torch.device
) -> None:
    assert streams.lock(memory) == ""
    refused = streams.lock(memory)
    assert "cudaHostRegister" in refused
    assert float(torch.ones(3, device=cuda).sum()) == 3.0
    torch.cuda.synchronize()
    streams.unlock(memory)
    again = StreamCopier(streams)
    again.admit(memory)
    assert again.problem == ""
    again.release(memory)


@pytest.mark.integration
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_killed_rank_goes_on_from_a_snapshot_in_the_weights_of_a_run_without_it(tmp_path: Path, stage: int) -> None:
    runs: dict[str, dict[str, Any]] = {"plain": {"plain": True}, "killed": {"faults": KILL, "resilience": EVERY_STEP}}
    for name, options in runs.items():
        with launched(tmp_path / name, launch_args=ONE_GPU, deepspeed_config=config(stage), **options) as run:
            assert run.wait(280.0) == 0, run.output()[-4000:]
    # That of the step before was being copied beside the one that was struck.
    assert re.search(r"fast-forwarded to step [67] ", run.output()), run.output()[-4000:]
    assert run.report()["num_generations"] == 2
    assert digest(tmp_path / "killed") == digest(tmp_path / "plain")


@pytest.fixture(scope="module")
def results() -> dict[str, dict[str, Any]]:
    """Of the worker, by ZeRO stage."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device; scripts/gpu-check runs it on a machine that has one")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    environment = {**os.environ, **{name: str(value) for name, value in place.items()}}
    environment["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # for results that are the same each time
    done = subprocess.run(
        [sys.executable, str(WORKER)], env=environment, capture_output=True, text=True, timeout=580, check=False
    )
    assert done.returncode == 0, done.stderr[-6000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"case"')]
    return {line["case"]: line for line in lines}


@pytest.mark.integration
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("stage", STAGES)
class TestOfAnEngine:
    def test_what_is_copied_beside_a_step_is_the_state_before_it(
        self, results: dict[str, dict[str, Any]], stage: str
    ) -> None:
        found = results[stage]
        assert found["said"] == []
        assert all(found["pending"]), "whole before it could be"
        assert found["different"] == []

    def test_it_brings_everything_back(self, results: dict[str, dict[str, Any]], stage: str) -> None:
        assert results[stage]["loaded"]
        assert results[stage]["course"] == [True, True], "losses and state of the steps after it"

    def test_a_write_beneath_the_copy_costs_that_snapshot_only(
        self, results: dict[str, dict[str, Any]], stage: str
    ) -> None:
        found = results[stage]["beneath"]
        assert found == {"lost": 7, "is_there": False, "next": []}

    def test_nothing_grows(self, results: dict[str, dict[str, Any]], stage: str) -> None:
        (device, resident, arena, locked), later = results[stage]["sizes"]
        assert later[0] == device
        assert later[1] - resident < 16 * MIB
        assert later[2:] == [arena, locked]
