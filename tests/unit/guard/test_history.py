"""How far the record of steps reaches, and what cuts it short."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from resilience.deepspeed.adapter import Position
from resilience.guard.history import History, same_groups
from resilience.guard.recorder import ForwardEvent, Recorder
from resilience.guard.rng import capture_rng

START = Position(micro_steps=0, boundary=None, in_no_sync=False, num_unmanaged_backwards=0, in_step=False)
GROUPS = [{"lr": 0.1, "betas": (0.9, 0.99)}]


class Adapter:
    """The part of `EngineAdapter` that a recorder uses, without DeepSpeed."""

    coalesces_reduction = False
    in_engine_backward = False

    def __init__(self) -> None:
        self.module = torch.nn.Linear(600, 2)

    def position(self) -> Position:
        return START

    def rng_states(self) -> dict[str, torch.Tensor]:
        return {}


class Steps:
    """Trains a linear layer, and keeps what was fed to it."""

    def __init__(self, max_bytes: int = 1 << 30) -> None:
        self.adapter = Adapter()
        self.recorder = Recorder(self.adapter)  # type: ignore[arg-type]
        self.history = History(max_bytes)
        self.step = 0
        self.was_reused = False

    def take(self, inputs: torch.Tensor | None = None, *, outside: bool = False, **known: Any) -> None:
        self.step += 1
        args = (torch.full((2, 600), float(self.step)) if inputs is None else inputs,)
        event = self.recorder.before_forward(args, {})
        output = self.recorder.after_forward(event, self.adapter.module(*args).sum(0 if outside else (0, 1)))
        output.sum().backward()
        if self.history.is_recording:
            values: dict[str, Any] = {"before": GROUPS, "after": GROUPS, **known}
            self.was_reused |= self.history.add(
                self.step,
                self.recorder.events,
                position=START,
                rng=capture_rng(self.adapter),  # type: ignore[arg-type]
                lr_kwargs=None,
                loss_scale=1.0,
                **values,
            )
        self.recorder.clear()

    def kept(self, since: int = 0) -> list[int]:
        return [record.step for record in self.history.since(since)]


def begun(max_bytes: int = 1 << 30) -> Steps:
    """A snapshot was taken at the end of step 2."""
    steps = Steps(max_bytes)
    steps.take()
    steps.take()
    steps.history.begin(2, GROUPS)
    return steps


def test_nothing_is_kept_before_there_is_a_snapshot_to_go_back_to() -> None:
    steps = Steps()
    steps.take()
    assert steps.kept() == []
    assert "no memory snapshot was taken" in steps.history.problem(0)


def test_it_reaches_back_to_the_first_snapshot_and_no_further() -> None:
    steps = begun()
    for _ in range(3):
        steps.take()
    assert steps.kept() == [3, 4, 5]
    assert steps.kept(since=4) == [5]
    assert steps.history.problem(2) == ""
    assert "older than step 2" in steps.history.problem(1)


def test_what_no_snapshot_needs_is_forgotten() -> None:
    steps = begun()
    for _ in range(3):
        steps.take()
    before = steps.history.num_bytes
    steps.history.trim(4)
    assert steps.kept() == [5]
    assert 0 < steps.history.num_bytes < before


def test_a_step_that_cannot_be_run_again_cuts_it() -> None:
    steps = begun()
    steps.take()
    steps.take(problem="the script is inside engine.coalesce_grad_reduction()")
    steps.take()
    assert "step 4 cannot be run again: the script is inside" in steps.history.problem(3)
    assert steps.history.problem(4) == ""
    assert steps.kept() == [5]


def test_a_loss_from_outside_of_the_engine_belongs_to_the_outputs_that_were() -> None:
    steps = begun()
    steps.take(outside=True)
    assert "its loss is computed outside of the engine" in steps.history.problem(2)


def test_it_stays_within_its_bytes() -> None:
    steps = begun(max_bytes=3 << 20)
    for _ in range(20):
        steps.take(torch.ones(600, 600))
    assert steps.history.num_bytes <= 3 << 20
    assert steps.kept() == [21, 22]
    assert "step 20 was dropped to stay within 3 MiB (snapshot.history_max_mib)" in steps.history.problem(19)


def test_a_reused_batch_buffer_is_noticed_and_copied_from_then_on() -> None:
    steps = begun()
    buffer = torch.ones(600, 600)
    for _ in range(3):
        with torch.no_grad():
            buffer.add_(1.0)
        steps.take(buffer)
        steps.recorder.copy_inputs |= steps.was_reused
    assert steps.was_reused
    assert "written into an input of step 4" in steps.history.problem(2), "the last one that was kept by reference"
    with torch.no_grad():
        buffer.add_(1.0)
    assert steps.kept() == [5], "from here on it is copied"
    assert not any(record.spoiled() for record in steps.history.since(4))


def test_a_buffer_that_is_written_behind_the_version_counter_is_noticed_by_its_hash() -> None:
    steps = begun()
    buffer = torch.ones(600, 600)
    steps.take(buffer)
    (record,) = steps.history.since(2)
    assert not record.spoiled()
    buffer.numpy()[3, 3] = 2.0
    assert record.spoiled()


def test_learning_rates_that_the_script_sets_are_kept_and_those_of_the_schedule_are_not() -> None:
    steps = begun()
    scheduled = [{"lr": 0.2, "betas": (0.9, 0.99)}]
    steps.take(before=GROUPS, after=scheduled)
    steps.take(before=scheduled, after=scheduled)
    written = [{"lr": 0.05, "betas": (0.9, 0.99)}]
    steps.take(before=written, after=written)
    assert [record.script_groups for record in steps.history.since(2)] == [None, None, written]
    assert steps.history.has_written_groups(GROUPS)
    assert not steps.history.has_written_groups([{"lr": 0.05, "betas": (0.9, 0.99)}])


def test_outputs_are_not_held_beyond_their_step() -> None:
    steps = begun()
    steps.take()
    (record,) = steps.history.since(2)
    forwards = [event for event in record.events if isinstance(event, ForwardEvent)]
    assert forwards
    assert not any(any(event.pending) or event.waiting for event in forwards)


@pytest.mark.parametrize(
    ("other", "same"),
    [
        ([{"lr": 0.1, "betas": (0.9, 0.99)}], True),
        ([{"lr": 0.1, "betas": (0.9, 0.98)}], False),
        ([{"lr": torch.tensor(0.1), "betas": (0.9, 0.99)}], False),
        ([{"lr": 0.1}], False),
        ([], False),
    ],
)
def test_groups_that_say_the_same(other: Any, same: bool) -> None:
    assert same_groups(GROUPS, other) is same
