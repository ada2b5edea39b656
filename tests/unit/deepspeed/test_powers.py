"""Steps after a load end in the bits of an uninterrupted course, also where the optimizer keeps state to itself."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

from resilience.deepspeed import powers

LOADED_AT, LAST = 19, 40


def course(parameter: torch.nn.Parameter, optimizer: Any, first: int) -> torch.Tensor:
    for step in range(first, LAST + 1):
        generator = torch.Generator().manual_seed(step)
        parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
        if step == LOADED_AT and first == 1:
            saved.update(
                weights=parameter.detach().clone(),
                state={key: torch.as_tensor(value).clone() for key, value in optimizer.state[parameter].items()},
            )
    return parameter.detach().clone()


saved: dict[str, Any] = {}


def go_back(parameter: torch.nn.Parameter, optimizer: Any) -> None:
    parameter.data.copy_(saved["weights"])
    for key, value in saved["state"].items():
        optimizer.state[parameter][key] = int(value) if key == "step" else value.clone()


# DeepSpeed compiles the first one for this test alone.
@pytest.mark.parametrize("kind", [pytest.param(DeepSpeedCPUAdam, marks=pytest.mark.long), FusedAdam])
def test_powers_are_multiplied_up_again(kind: type[Any]) -> None:
    parameter = torch.nn.Parameter(torch.ones(1000))
    optimizer = kind([parameter], lr=1e-2, betas=(0.9, 0.999))
    engine: Any = types.SimpleNamespace(optimizer=types.SimpleNamespace(optimizer=optimizer))
    expected = course(parameter, optimizer, 1)

    go_back(parameter, optimizer)
    assert not torch.equal(course(parameter, optimizer, LOADED_AT + 1), expected), "there is nothing to bring back"

    go_back(parameter, optimizer)
    powers.bring_back(engine, 0)
    assert torch.equal(course(parameter, optimizer, LOADED_AT + 1), expected)
    assert powers.origin(engine) == 0


def test_a_load_of_other_peoples_checkpoints_begins_anew() -> None:
    parameter = torch.nn.Parameter(torch.ones(4))
    optimizer = torch.optim.AdamW([parameter])
    engine: Any = types.SimpleNamespace(optimizer=optimizer)
    assert powers.origin(engine) == 0
    parameter.grad = torch.ones(4)
    optimizer.step()
    powers.loaded(engine)
    assert powers.origin(engine) == 1
    powers.bring_back(engine, 0)  # nothing to be done for torch's own
    assert powers.origin(engine) == 0
