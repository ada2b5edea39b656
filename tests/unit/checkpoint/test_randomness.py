"""Random states survive JSON."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy
import pytest
import torch

from resilience.checkpoint import randomness
from resilience.errors import CheckpointError


def draw() -> list[float]:
    """One number of each generator, with the halves of pairs that some of them keep back."""
    return [torch.rand(1).item(), float(numpy.random.standard_normal()), random.gauss(0, 1), random.random()]


def test_all_generators_go_on_where_they_were_after_json() -> None:
    draw()
    states = json.loads(json.dumps(randomness.capture({"tracked": torch.arange(7, dtype=torch.uint8)})))
    expected = [draw(), draw()]
    extra = randomness.restore(states, source="here")
    assert [draw(), draw()] == expected
    assert extra["tracked"].tolist() == list(range(7))


@pytest.mark.parametrize("damage", [{"torch": 1}, {"numpy": ["MT19937"]}, {"extra": None}])
def test_what_was_not_captured_is_refused_and_changes_nothing(damage: dict[str, Any]) -> None:
    states = randomness.capture({})
    before = torch.get_rng_state()
    draw()
    after = torch.get_rng_state()
    with pytest.raises(CheckpointError, match="here: not random states"):
        randomness.restore({**states, **damage}, source="here")
    assert torch.equal(torch.get_rng_state(), after)
    assert not torch.equal(before, after)
