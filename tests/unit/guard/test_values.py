"""Values that pass through the recorder: found, tapped and held in any nesting."""

from __future__ import annotations

import collections

import numpy as np
import pytest
import torch

from resilience.guard.values import KeptTensor, Unrecordable, differentiable, keep, take, tap, unchanged

Pair = collections.namedtuple("Pair", "first second")


def test_small_tensors_are_copied_and_survive_a_change_in_place() -> None:
    tokens = torch.arange(8)
    kept = keep({"ids": (tokens, [tokens])})
    tokens.zero_()
    assert unchanged(kept)
    taken = take(kept)
    assert torch.equal(taken["ids"][0], torch.arange(8))
    assert torch.equal(taken["ids"][1][0], torch.arange(8))


def test_a_forward_that_writes_into_its_input_does_not_spoil_the_copy() -> None:
    kept = keep(torch.ones(4))
    take(kept).zero_()
    assert torch.equal(take(kept), torch.ones(4))


def test_large_tensors_are_kept_by_reference_and_watched() -> None:
    images = torch.zeros(600, 600)
    kept = keep((images,))
    assert isinstance(kept[0], KeptTensor)
    assert kept[0].tensor is images
    assert unchanged(kept)
    images[0, 0] = 1
    assert not unchanged(kept)


def test_copying_can_be_asked_for() -> None:
    images = torch.zeros(600, 600)
    kept = keep((images,), copy=True)
    images[0, 0] = 1
    assert unchanged(kept)
    assert float(take(kept)[0].sum()) == 0


def test_containers_and_plain_values_come_back_as_they_were() -> None:
    value = {"a": Pair(1, torch.tensor(2.0)), "b": [None, "text", 1.5, torch.float16], "c": np.arange(3)}
    taken = take(keep(value))
    assert isinstance(taken["a"], Pair)
    assert taken["b"] == value["b"]
    assert np.array_equal(taken["c"], np.arange(3))


def test_what_cannot_be_kept_is_refused_in_words() -> None:
    with pytest.raises(Unrecordable, match="graph goes on outside"):
        keep(torch.ones(2, requires_grad=True))
    with pytest.raises(Unrecordable, match="object may change unseen"):
        keep([object()])


def test_outputs_are_tapped_where_they_carry_a_graph() -> None:
    weight = torch.ones(3, requires_grad=True)
    loss, logits, label = weight.sum(), weight * 2, torch.tensor(1)
    outputs = {"loss": loss, "rest": (logits, [label])}
    assert [tensor.shape for tensor in differentiable(outputs)] == [torch.Size([]), torch.Size([3])]
    seen = []
    tapped = tap(outputs, lambda place, tensor: seen.append(place) or tensor.clone())  # type: ignore[func-returns-value]
    assert seen == [0, 1]
    assert tapped is outputs
    assert tapped["loss"] is not loss
    assert tapped["rest"][1][0] is label


def test_a_model_output_keeps_its_attributes_in_step() -> None:
    from transformers.modeling_outputs import CausalLMOutput

    weight = torch.ones(3, requires_grad=True)
    outputs = CausalLMOutput(loss=weight.sum(), logits=weight * 2)
    tapped = tap(outputs, lambda _, tensor: tensor.clone())
    assert tapped.loss is tapped["loss"]
    assert tapped.logits is tapped[1]
    assert tapped.loss.grad_fn is not None


def test_what_a_forward_does_to_a_numpy_array_does_not_reach_the_next_replay() -> None:
    kept = keep((np.zeros(3),))
    take(kept)[0][:] = 1.0
    assert not take(kept)[0].any()
