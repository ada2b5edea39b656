"""Checkpoints on another number of ranks than saved them: two, then one, then two again."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from resilience.checkpoint.convert import convert, identify, is_good, universal_of
from resilience.checkpoint.verify import candidates
from tests.integration.harness import DEEPSPEED_CONFIG, free_port, launched, resilience

with contextlib.redirect_stdout(io.StringIO()):
    from resilience.deepspeed.consolidate import digest
    from resilience.deepspeed.sharded import KINDS, Sharded, bits
    from resilience.deepspeed.universal import run_conversion

pytestmark = pytest.mark.integration

WORKER = Path(__file__).parent / "workers" / "elastic_rank.py"
CASES = [
    {"name": "zero1-bf16", "stage": 1, "dtype": "bf16"},
    {"name": "zero2-fp32", "stage": 2, "dtype": "fp32"},
    {"name": "zero3-fp32", "stage": 3, "dtype": "fp32"},
]
NAMES = [str(case["name"]) for case in CASES]
LARGEST_DIFFERENCE = {"fp32": 1e-6, "bf16": 1e-3}
"""Of a master after four more steps: the sums of gradients were taken in another order, in bf16 where weights are."""


def run_ranks(directory: Path, world_size: int, **settings: Any) -> list[dict[str, Any]]:
    """Run the ranks of one job to their end; what each of them reports, by case."""
    directory.mkdir()
    port = free_port()
    content = {"cases": CASES, "run_id": "run", "result": str(directory / "result-<rank>.json"), **settings}
    ranks = []
    for rank in range(world_size):
        environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        with (directory / f"rank-{rank}.log").open("wb") as log:
            command = [sys.executable, str(WORKER), json.dumps(content)]
            ranks.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
    try:
        for rank, process in enumerate(ranks):
            assert process.wait(timeout=180) == 0, (directory / f"rank-{rank}.log").read_text()[-4000:]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
        for path in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_{os.getuid()}_127.0.0.1_{port}_*"):
            path.unlink(missing_ok=True)
    return [json.loads((directory / f"result-{rank}.json").read_text()) for rank in range(world_size)]


@dataclasses.dataclass
class Switched:
    """A job of two ranks that went on as one, and then as two."""

    root: Path
    straight: list[dict[str, Any]]
    one: list[dict[str, Any]]
    two: list[dict[str, Any]]

    def shards(self, case: str, place: str) -> Sharded:
        return Sharded(self.root / case / place)


@pytest.fixture(scope="module")
def switched(tmp_path_factory: pytest.TempPathFactory) -> Switched:
    directory = tmp_path_factory.mktemp("elastic")
    root = directory / "root"
    common: dict[str, Any] = {"root": str(root)}
    straight = run_ranks(
        directory / "straight", 2, seed=1, saves=[[2, "ck"], [6, "straight"]], snapshot="memory", **common
    )
    one = run_ranks(directory / "one", 1, seed=2, load="ck", lie=True, again="one", saves=[[4, "ck"]], **common)
    two = run_ranks(directory / "two", 2, seed=3, load="ck", again="two", saves=[[6, "ck"]], **common)
    return Switched(root, straight, one, two)


@pytest.mark.parametrize("case", NAMES)
def test_all_that_was_saved_is_there_after_each_switch_bit_for_bit(switched: Switched, case: str) -> None:
    for before, after, num_shards in (
        ("ck/global_step2", "one/global_step2", 1),
        ("ck/global_step4", "two/global_step4", 2),
    ):
        source, loaded = switched.shards(case, before), switched.shards(case, after)
        assert (source.num_shards, loaded.num_shards) == (3 - num_shards, num_shards)
        assert source.numels == loaded.numels
        assert sum(source.numels.values()) == 7 * 13 + 13 + 2 * 13 + 13 * 7 + 7
        assert set(source.steps()) == set(loaded.steps())
        for name in source.numels:
            for kind in KINDS:
                assert torch.equal(bits(source.read(kind, name)), bits(loaded.read(kind, name))), (kind, name)
        others = [
            {name: tensor.tolist() for name, tensor in (*dict(each.frozen()).items(), *buffers(each))}
            for each in (source, loaded)
        ]
        assert others[0] == others[1]
        assert {"frozen", "num_calls", "mean"} <= others[0].keys()


def buffers(sharded: Sharded) -> list[tuple[str, torch.Tensor]]:
    return [(name, sharded.model["module"][name]) for name in ("num_calls", "mean")]


@pytest.mark.parametrize("case", NAMES)
def test_training_goes_on_as_it_would_have_with_as_many_samples(switched: Switched, case: str) -> None:
    for job, batch in ((switched.one, [8, 4]), (switched.two, [8, 2])):
        assert [rank[case]["batch"] for rank in job] == [batch] * len(job)
        assert not any(rank[case]["universal_left_on"] or rank[case]["error"] for rank in job)
        assert [rank[case]["decays"] for rank in job] == [[0.1, 0.0]] * len(job)
    assert [switched.one[0][case]["loaded_step"], switched.two[0][case]["loaded_step"]] == [2, 4]
    straight, ended = switched.shards(case, "straight/global_step6"), switched.shards(case, "ck/global_step6")
    # Adam's counts too: DeepSpeed alone counts on by two for each step, with ZeRO 3 and two groups of parameters.
    assert set(straight.steps()) == set(ended.steps()) == {6.0}
    bound = LARGEST_DIFFERENCE[case.partition("-")[2]]
    for name in straight.numels:
        difference = (straight.read("fp32", name) - ended.read("fp32", name)).abs().max()
        assert float(difference) <= bound, name


def test_what_is_done_is_said(switched: Switched) -> None:
    first, second = switched.one[0]["zero3-fp32"]["notes"]
    assert "global_step2 was saved by another number of ranks and converted for 1" in first
    assert "not bit for bit as it would have" in first
    assert second.endswith(
        "train_batch_size 8 = 2 (micro-batch) × 4 (accumulation) × 1 (ranks), in place of accumulation 2"
    )


@pytest.mark.parametrize("case", NAMES)
def test_one_wrong_bit_after_loading_is_refused_and_what_was_converted_and_damaged_is_made_anew(
    switched: Switched, case: str
) -> None:
    assert "exp_avg_sq of first.weight differs from what was saved" in switched.one[0][case]["lie"]
    # The load that followed, of a file with a flipped bit, went well; that file is good again.
    assert resilience("checkpoints", "verify", str(switched.root / case / "ck"), cwd=switched.root).returncode == 0


@pytest.mark.parametrize("case", NAMES)
def test_what_was_converted_is_no_checkpoint_that_a_load_falls_back_to(switched: Switched, case: str) -> None:
    place = switched.root / case / "ck"
    assert sorted(path.name for path in place.iterdir() if path.suffix != ".py") == [
        "global_step2",
        "global_step2-universal",
        "global_step4",
        "global_step4-universal",
        "global_step6",
        "latest",
    ]
    assert [each.tag for each in candidates(place)] == ["global_step6", "global_step4", "global_step2"]


def test_the_command_converts_by_hand_and_refuses_ranks_that_cannot_keep_the_batch(switched: Switched) -> None:
    place = switched.root / "zero3-fp32" / "straight" / "global_step6"
    refused = resilience("checkpoints", "convert", str(place), "--world-size", "3", cwd=switched.root)
    assert refused.returncode == 64
    assert "cannot keep train_batch_size 8: with micro-batch 2 use 1, 2 or 4 ranks" in refused.stderr
    assert not universal_of(place).exists()
    for was_there in (False, True):
        answer = resilience("checkpoints", "convert", str(place), "--world-size", "4", "--json", cwd=switched.root)
        assert answer.returncode == 0, answer.stderr
        content = json.loads(answer.stdout)
        assert content["was_there"] is was_there
        assert content["batch"]["accumulation"] == 1
        assert Path(content["universal"]) == universal_of(place)
    assert digest(universal_of(place)) == digest(place)
    assert (place.parent / "latest_universal").read_text() == "global_step6-universal"


def test_a_memory_snapshot_is_converted_as_it_lies(switched: Switched) -> None:
    source = switched.root / "zero3-fp32" / "memory" / "state"
    universal = convert(source, identify(source, verified=True), run_conversion, now=1.0)
    assert is_good(universal)
    assert digest(universal) == digest(switched.root / "zero3-fp32" / "straight" / "global_step6")


def test_the_same_run_keeps_its_random_states_where_it_has_them(switched: Switched) -> None:
    saved, loaded = switched.straight[0]["zero2-fp32"]["random"], switched.one[0]["zero2-fp32"]["random"]
    assert len(loaded) == len(saved)
    first, second = (rank["zero2-fp32"]["random"] for rank in switched.two)
    assert first == switched.one[0]["zero2-fp32"]["random"]  # of rank 0, which drew none meanwhile
    assert second != first  # of rank 1, which was not there


@pytest.mark.long
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_script_that_nobody_adapted_goes_on_with_fewer_ranks_and_with_more(tmp_path: Path, stage: int) -> None:
    config = {**DEEPSPEED_CONFIG, "zero_optimization": {"stage": stage}}
    saved = {}
    for number, (ranks, steps) in enumerate(((2, 2), (1, 4), (2, 6))):
        directory = tmp_path / str(number)
        script_args = ["--steps", str(steps), "--save-every", "2", "--checkpoints", str(tmp_path / "checkpoints")]
        launch_args = ["--num_gpus", str(ranks)]
        with launched(directory, script_args=script_args, launch_args=launch_args, deepspeed_config=config) as run:
            assert run.wait() == 0, run.output()[-4000:]
            assert f"done at step {steps}, skipped 0" in run.output()
            run.assert_nothing_left()
        checkpoints = tmp_path / "checkpoints"
        saved[steps] = digest(checkpoints / f"global_step{steps}")
        if steps > 2:
            assert digest(checkpoints / f"global_step{steps - 2}-universal") == saved[steps - 2]
            assert "an optimizer step takes as many samples as before: train_batch_size 16 = 4" in run.output()
            assert run.report()["exit_code"] == 0
    assert len(set(saved.values())) == 3
