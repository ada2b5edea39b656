"""Whose word counts for the batch on another number of ranks: the checkpoint's, unless the configuration says one."""

from __future__ import annotations

import types
from typing import Any

import pytest

from resilience.checkpoint.batch import Batch
from resilience.deepspeed.universal_batch import batch_of, keep_batch
from resilience.errors import CheckpointError

SAVED = Batch(train_batch_size=16, micro_batch_size=4, accumulation=2, world_size=2)


class Engine:
    """What is asked of a DeepSpeedEngine."""

    def __init__(self, world_size: int, micro: int, accumulation: int, *, managed: bool = True, **stated: int) -> None:
        self.dp_world_size = world_size
        self._micro, self._accumulation = micro, accumulation
        self._managed = managed
        self._config = types.SimpleNamespace(_param_dict=stated)
        self._is_gradient_accumulation_boundary: bool | None = None
        self.optimizer = types.SimpleNamespace(gradient_accumulation_steps=accumulation)
        self.tput_timer = types.SimpleNamespace(batch_size=0)

    def train_batch_size(self) -> int:
        return self._micro * self._accumulation * self.dp_world_size

    def train_micro_batch_size_per_gpu(self) -> int:
        return self._micro

    def gradient_accumulation_steps(self) -> int:
        return self._accumulation

    def managed_gradient_accumulation(self) -> bool:
        return self._managed

    def set_train_batch_size(self, train_batch_size: int) -> None:
        self._accumulation = train_batch_size // (self._micro * self.dp_world_size)

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        self._is_gradient_accumulation_boundary = is_boundary


def parts(micro: int, accumulation: int) -> dict[str, Any]:
    return {"train_micro_batch_size_per_gpu": micro, "gradient_accumulation_steps": accumulation}


def test_the_accumulation_follows() -> None:
    engine = Engine(1, 4, 2, **parts(4, 2))
    said = keep_batch(engine, SAVED)
    assert batch_of(engine) == Batch(train_batch_size=16, micro_batch_size=4, accumulation=4, world_size=1)
    assert engine.optimizer.gradient_accumulation_steps == 4
    assert "16 = 4 (micro-batch) × 4 (accumulation) × 1 (ranks), in place of accumulation 2" in said


def test_as_many_ranks_or_as_many_samples_change_nothing() -> None:
    assert keep_batch(Engine(2, 4, 3), SAVED) == ""
    assert "as many samples as before" in keep_batch(Engine(1, 4, 4), SAVED)


def test_what_the_configuration_says_of_the_whole_is_meant() -> None:
    engine = Engine(1, 4, 8, train_batch_size=32, train_micro_batch_size_per_gpu=4)
    assert "the configuration says train_batch_size 32" in keep_batch(engine, SAVED)
    assert engine.train_batch_size() == 32


def test_ranks_that_do_not_divide_it_are_refused() -> None:
    with pytest.raises(CheckpointError, match="3 ranks with micro-batch 4 cannot keep train_batch_size 16"):
        keep_batch(Engine(3, 4, 2, **parts(4, 2)), SAVED)


def test_a_script_that_takes_its_own_steps_is_refused_before_its_first() -> None:
    engine = Engine(1, 4, 2, **parts(4, 2))
    keep_batch(engine, SAVED)
    with pytest.raises(CheckpointError, match="set gradient_accumulation_steps to 4 in the script"):
        engine.set_gradient_accumulation_boundary(False)
    set_before = Engine(1, 4, 2, **parts(4, 2))
    set_before.set_gradient_accumulation_boundary(True)
    for own in (set_before, Engine(1, 4, 2, managed=False, **parts(4, 2))):
        with pytest.raises(CheckpointError, match="decides itself when a step is taken"):
            keep_batch(own, SAVED)
        assert own.gradient_accumulation_steps() == 2
