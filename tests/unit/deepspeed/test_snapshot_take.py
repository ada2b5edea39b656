"""What is in an engine is held against all that a snapshot holds, not only against what the engine happens to have."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from resilience.deepspeed import powers, snapshot_take
from resilience.deepspeed.snapshot_take import Taker, compare, problem
from resilience.snapshot.hashing import hash_file
from resilience.snapshot.manifest import Commit, FileEntry, Part

MODEL, SHARD = "state/mp_rank_00_model_states.pt", "state/zero_pp_rank_0_mp_rank_00_optim_states.pt"


class Engine:
    """As much of a DeepSpeedEngine as saving asks for."""

    def __init__(self) -> None:
        self.checkpoint_engine: Any = SimpleNamespace(marker="the engine's own")
        self.has_moe_layers = False
        self.weights = {"a": torch.arange(5.0), "b": torch.ones(3)}
        self.state: dict[str, torch.Tensor] = {"exp_avg": torch.full((5,), 2.0), "step": torch.tensor(4.0)}
        self.fails = False

    def save_checkpoint(self, save_dir: str, tag: str, save_latest: bool) -> None:
        assert not save_latest
        self._create_checkpoint_file(save_dir, tag, False)
        self.checkpoint_engine.save(self.weights, f"{save_dir}{MODEL}")
        if self.fails:
            raise RuntimeError("cut short")
        self.checkpoint_engine.save({"optimizer": self.state}, f"{save_dir}{SHARD}")

    def _create_checkpoint_file(self, *_: Any) -> None:
        raise AssertionError("a folder was made")


def part_of(entries: tuple[FileEntry, ...]) -> Part:
    commit = Commit(
        run_id="run",
        generation=1,
        step=4,
        rank=0,
        world_size=1,
        slot=0,
        sequence=1,
        at=0.0,
        clean_through=0,
        blocked_s=0.0,
        random={},
        counters={},
        trail_bytes=0,
        files=entries,
    )
    return Part(commit=commit, trail="")


@pytest.fixture
def taken(tmp_path: Path) -> tuple[Engine, dict[int, Part]]:
    engine = Engine()
    taker = Taker(engine)
    entries = taker.fill(tmp_path, taker.collect())
    taker.close()
    return engine, {0: part_of(tuple(hash_file(tmp_path / entry.path, entry) for entry in entries))}


def test_what_was_taken_is_in_the_engine(taken: tuple[Engine, dict[int, Part]]) -> None:
    engine, parts = taken
    assert compare(engine, parts, rank=0) == ""
    assert engine.checkpoint_engine.marker == "the engine's own"


def test_one_bit_is_a_difference(taken: tuple[Engine, dict[int, Part]]) -> None:
    engine, parts = taken
    engine.state["exp_avg"].view(torch.int32)[3] ^= 1
    assert compare(engine, parts, rank=0) == f"{SHARD}: data/0 in the engine is not what the snapshot holds"


def test_less_is_a_difference(taken: tuple[Engine, dict[int, Part]]) -> None:
    engine, parts = taken
    del engine.state["step"]
    assert compare(engine, parts, rank=0) == f"{SHARD}: the engine has 1 storages where the snapshot holds 2"


def test_a_file_of_this_rank_that_nothing_belongs_to_is_a_difference(taken: tuple[Engine, dict[int, Part]]) -> None:
    engine, parts = taken
    entries = parts[0].commit.files
    more = (*entries, dataclasses.replace(entries[0], path="state/further.pt"))
    assert "further.pt" in compare(engine, {0: part_of(more)}, rank=0)


def test_files_of_other_ranks_are_no_business_of_this_one(taken: tuple[Engine, dict[int, Part]]) -> None:
    engine, parts = taken
    entries = parts[0].commit.files
    others = part_of((dataclasses.replace(entries[1], path="state/zero_pp_rank_1_mp_rank_00_optim_states.pt"),))
    assert compare(engine, {**parts, 1: others}, rank=0) == ""


def test_the_engine_is_as_it_was_after_a_save_that_fails(taken: tuple[Engine, dict[int, Part]]) -> None:
    engine, _ = taken
    before = dict(vars(engine))
    engine.fails = before["fails"] = True
    with pytest.raises(RuntimeError, match="cut short"):
        Taker(engine).collect()
    assert vars(engine) == before


def test_a_file_that_is_saved_no_more_is_gone(tmp_path: Path) -> None:
    engine = Engine()
    taker = Taker(engine)
    taker.fill(tmp_path, taker.collect())
    images = taker.collect()
    del images[SHARD]
    entries = taker.fill(tmp_path, images)
    assert [entry.path for entry in entries] == [MODEL]
    assert not (tmp_path / SHARD).exists()
    taker.close()


def test_what_cannot_be_taken_is_named() -> None:
    class PipelineEngine:
        pass

    assert "pipeline" in problem(PipelineEngine())
    engine = SimpleNamespace(
        zero_nvme_offload_optimizer=lambda: True, checkpoint_engine=SimpleNamespace(is_decoupled=lambda: False)
    )
    assert "NVMe" in problem(engine)
    engine.zero_nvme_offload_optimizer = lambda: False
    assert problem(engine) == ""
    assert snapshot_take.counters(
        SimpleNamespace(micro_steps=8, global_steps=4, global_samples=32, skipped_steps=1)
    ) == {"micro_steps": 8, "global_steps": 4, "global_samples": 32, "skipped_steps": 1, powers.NAME: 0}
