"""What is recorded of a step, with an engine that is nothing but a module."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch

from resilience.deepspeed.adapter import Position
from resilience.guard.recorder import BackwardEvent, ForwardEvent, Recorder

START = Position(micro_steps=0, boundary=None, in_no_sync=False, num_unmanaged_backwards=0, in_step=False)


class Adapter:
    """The part of `EngineAdapter` that a recorder uses, without DeepSpeed."""

    coalesces_reduction = False
    in_engine_backward = False

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module

    def position(self) -> Position:
        return START

    def rng_states(self) -> dict[str, torch.Tensor]:
        return {}


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.linear(x)
        return {"loss": logits.sum(), "logits": logits}


class Recorded:
    def __init__(self, model: torch.nn.Module | None = None) -> None:
        self.model = model or Model()
        self.recorder = Recorder(Adapter(self.model))  # type: ignore[arg-type]

    def forward(self, *args: Any) -> Any:
        event = self.recorder.before_forward(args, {})
        return self.recorder.after_forward(event, self.model(*args))


def test_only_what_the_script_sends_back_is_recorded() -> None:
    recorded = Recorded()
    recorded.forward(torch.ones(2, 4))["loss"].backward()
    forward, backward = recorded.recorder.events
    assert isinstance(forward, ForwardEvent)
    assert isinstance(backward, BackwardEvent)
    # The logits have a gradient too, but it comes from inside the model.
    assert [(place, float(kept.tensor)) for _, place, kept, _ in backward.cotangents] == [(0, 1.0)]
    assert recorded.recorder.why_unavailable() == ""


def test_two_outputs_sent_back_together_are_one_pass() -> None:
    recorded = Recorded()
    outputs = recorded.forward(torch.ones(2, 4))
    (outputs["loss"] + outputs["logits"].square().mean()).backward()
    (backward,) = (event for event in recorded.recorder.events if isinstance(event, BackwardEvent))
    assert sorted(place for _, place, _, _ in backward.cotangents) == [0, 1]
    marks = {place: mark for _, place, _, mark in backward.cotangents}
    assert marks[0] is None, "a scalar's cotangent does not depend on it"
    assert marks[1] is not None


def test_micro_steps_are_counted_by_backward_passes() -> None:
    recorded = Recorded()
    pair = [recorded.forward(torch.ones(2, 4))["loss"] for _ in range(2)]
    (pair[0] + pair[1]).backward()
    recorded.forward(torch.ones(2, 4))["loss"].backward()
    forwards = [event for event in recorded.recorder.events if isinstance(event, ForwardEvent)]
    assert [event.micro_step for event in forwards] == [0, 0, 1]
    assert recorded.recorder.num_backwards == 2


def test_an_input_changed_in_place_is_noticed_and_copied_from_the_next_step_on() -> None:
    recorded = Recorded(torch.nn.Linear(600, 2))
    images = torch.ones(600, 600)
    reasons = []
    for _ in range(3):
        recorded.forward(images).sum().backward()
        images.mul_(2)
        reasons.append(recorded.recorder.why_unavailable())
        recorded.recorder.clear()
    assert "changed in place" in reasons[0]
    assert reasons[1:] == ["", ""]


def test_outputs_sent_back_twice_make_the_step_unrepeatable() -> None:
    recorded = Recorded()
    outputs = recorded.forward(torch.ones(2, 4))
    outputs["loss"].backward(retain_graph=True)
    outputs["logits"].sum().backward()
    assert "backward twice" in recorded.recorder.why_unavailable()


def test_a_backward_of_an_earlier_step_is_noticed() -> None:
    recorded = Recorded()
    loss = recorded.forward(torch.ones(2, 4))["loss"]
    recorded.recorder.clear()
    loss.backward()
    assert "earlier step" in recorded.recorder.why_unavailable()


def test_without_a_backward_there_is_nothing_to_repeat() -> None:
    recorded = Recorded()
    recorded.forward(torch.ones(2, 4))
    assert "no backward" in recorded.recorder.why_unavailable()


def test_a_forward_in_evaluation_mode_is_forgotten() -> None:
    recorded = Recorded()
    recorded.model.eval()
    for _ in range(5):
        recorded.forward(torch.ones(2, 4))
    recorded.model.train()
    recorded.forward(torch.ones(2, 4))["loss"].backward()
    assert len(recorded.recorder.events) == 2


def memory_of(tensor: torch.Tensor) -> weakref.ref[torch.UntypedStorage]:
    return weakref.ref(tensor.untyped_storage())


def test_logits_that_the_script_does_not_use_are_freed_before_the_backward() -> None:
    recorded = Recorded()
    outputs = recorded.forward(torch.ones(2, 4))
    logits = memory_of(outputs["logits"])
    loss = outputs["loss"]
    assert logits() is not None
    del outputs
    assert logits() is None
    loss.backward()


def test_logits_that_the_script_made_its_loss_of_are_held_until_their_cotangent_came() -> None:
    recorded = Recorded()
    outputs = recorded.forward(torch.ones(2, 4))
    logits = memory_of(outputs["logits"])
    loss = outputs["logits"].sum()  # keeps no value for its own backward
    del outputs
    assert logits() is not None
    loss.backward()
    assert logits() is None
    backward = recorded.recorder.events[-1]
    assert isinstance(backward, BackwardEvent)
    assert backward.cotangents[0][3] is not None


def test_logits_whose_graph_the_script_keeps_are_freed_with_the_step() -> None:
    recorded = Recorded()
    outputs = recorded.forward(torch.ones(2, 4))
    total, logits = outputs["logits"].sum(), memory_of(outputs["logits"])
    outputs["loss"].backward()
    del outputs
    assert logits() is not None
    recorded.recorder.clear()
    assert logits() is None
    assert total.grad_fn is not None


def test_an_output_that_the_script_changed_in_place_makes_the_step_unrepeatable() -> None:
    recorded = Recorded()
    outputs = recorded.forward(torch.ones(2, 4))
    changed = outputs["logits"].div_(3)
    (outputs["loss"] + changed.square().mean()).backward()
    del outputs, changed
    assert recorded.recorder.why_unavailable() == "the script changed an output of the model in place"


def test_an_input_that_cannot_be_kept_makes_the_step_unrepeatable() -> None:
    recorded = Recorded()
    recorded.forward(torch.ones(2, 4, requires_grad=True))["loss"].backward()
    assert "requires gradients" in recorded.recorder.why_unavailable()


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_a_loss_scaled_in_place_sends_back_what_it_did(scale: float) -> None:
    recorded = Recorded()
    recorded.forward(torch.ones(2, 4))["loss"].mul_(scale).backward()
    backward = recorded.recorder.events[-1]
    assert isinstance(backward, BackwardEvent)
    assert float(backward.cotangents[0][2].tensor) == scale


def test_a_replayed_value_reaches_the_script_unless_it_wrote_there_itself() -> None:
    recorded = Recorded()
    kept, scaled = recorded.forward(torch.ones(2, 4))["loss"], recorded.forward(torch.ones(2, 4))["loss"]
    with torch.no_grad():
        scaled.mul_(3.0)
    before = float(scaled.detach())
    for event in [event for event in recorded.recorder.events if isinstance(event, ForwardEvent)]:
        recorded.recorder.overwrite(event, [torch.tensor(7.0), torch.zeros(2, 4)])
    assert float(kept.detach()) == 7.0
    assert float(scaled.detach()) == before


def test_batch_statistics_are_copied_although_no_version_counter_tells() -> None:
    recorded = Recorded(torch.nn.BatchNorm1d(4))
    for _ in range(4):
        recorded.forward(torch.randn(8, 4)).sum().backward()
    last = [event for event in recorded.recorder.events if isinstance(event, ForwardEvent)][-1]
    assert set(last.buffers) == {"running_mean", "running_var", "num_batches_tracked"}
    assert recorded.recorder.why_unavailable() == ""


def test_a_loss_that_the_script_keeps_does_not_keep_the_inputs_of_its_step() -> None:
    recorded = Recorded()
    inputs = torch.ones(1 << 17, 4)
    assert inputs.nbytes > 1 << 20, "smaller ones are copied"
    loss = recorded.forward(inputs)["loss"]
    loss.backward()
    recorded.recorder.clear()
    reference = weakref.ref(inputs)
    del inputs
    gc.collect()
    assert loss.grad_fn is not None
    assert reference() is None


def test_each_backward_pass_is_announced_once_from_inside() -> None:
    recorded = Recorded()
    tasks: list[int] = []
    recorded.recorder.on_backward = tasks.append
    for _ in range(2):
        outputs = recorded.forward(torch.ones(2, 4))
        (outputs["loss"] + outputs["logits"].sum()).backward()
    assert len(set(tasks)) == len(tasks) == 2
    assert -1 not in tasks


def test_a_backward_pass_to_a_forward_that_was_forgotten_is_not_replayed() -> None:
    recorded = Recorded()
    recorded.model.eval()
    loss = recorded.forward(torch.ones(2, 4))["loss"] * 2.0
    gc.collect()
    recorded.forward(torch.ones(2, 4))["loss"].backward()
    assert [event.index for event in recorded.recorder.events if isinstance(event, ForwardEvent)] == [1]
    loss.backward()
    assert "forgotten forward" in recorded.recorder.why_unavailable()
