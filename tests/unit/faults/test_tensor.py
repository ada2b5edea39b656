"""The tensor injector strikes exactly what the plan addresses, and counts it for the whole run."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from resilience.errors import FaultPlanError
from resilience.events import Strike
from resilience.faults.ledger import Ledger
from resilience.faults.plan import FaultPlan
from resilience.faults.tensor import TensorInjector

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def plan(*faults: dict[str, Any], seed: int = 0) -> FaultPlan:
    default = {"step": 5, "site": "linear.out", "kind": "inf"}
    return FaultPlan.model_validate({"seed": seed, "fault": [default | fault for fault in faults]})


def injector(run_dir: Path, *faults: dict[str, Any], rank: int = 0, seed: int = 0) -> TensorInjector:
    return TensorInjector(plan(*faults, seed=seed), rank=rank, ledger=Ledger(run_dir, rank))


def changed(before: torch.Tensor, after: torch.Tensor) -> list[int]:
    return (before != after).reshape(-1).nonzero().reshape(-1).tolist()


def test_only_the_address_is_struck(tmp_path: Path) -> None:
    here = injector(tmp_path, {"micro_step": 1, "layer": 2, "rank": 1}, rank=1)
    elsewhere = injector(tmp_path, {"micro_step": 1, "layer": 2, "rank": 1}, rank=0)
    for step, micro_step in ((4, 1), (5, 0), (6, 1)):
        here.begin(step, micro_step, 0)
        assert not here.armed
    elsewhere.begin(5, 1, 0)
    assert not elsewhere.armed
    here.begin(5, 1, 0)
    assert here.armed
    y = torch.ones(4, 4)
    assert not here.strike("linear.out", 1, y)
    assert not here.strike("linear.dgrad", 2, y)
    assert y.isfinite().all()
    assert here.strike("linear.out", 2, y)
    assert int(y.isinf().sum()) == 1
    assert not here.armed


def test_a_transient_fault_is_gone_when_the_operation_runs_again(tmp_path: Path) -> None:
    one = injector(tmp_path, {})
    one.begin(5, 0, 0)
    assert one.strike("linear.out", 0, torch.ones(8))
    assert not one.strike("linear.out", 0, torch.ones(8), call=1)
    one.begin(5, 0, 1)
    assert not one.armed


def test_repeat_counts_over_attempts_and_generations(tmp_path: Path) -> None:
    one = injector(tmp_path, {"repeat": 3})
    one.begin(5, 0, 0)
    assert one.strike("linear.out", 0, torch.ones(8))
    one.begin(5, 0, 1)
    assert one.strike("linear.out", 0, torch.ones(8))
    restarted = injector(tmp_path, {"repeat": 3})
    restarted.begin(5, 0, 0)
    assert restarted.strike("linear.out", 0, torch.ones(8))
    assert not restarted.strike("linear.out", 0, torch.ones(8))
    strikes = Ledger(tmp_path, 0).strikes()
    assert [(s.strike_id, s.attempt) for s in strikes] == [("f0-n0", 0), ("f0-n1", 1), ("f0-n2", 0)]


def test_a_persistent_fault_strikes_the_same_element_every_time(tmp_path: Path) -> None:
    one = injector(tmp_path, {"repeat": -1})
    places = set()
    for attempt in range(4):
        one.begin(5, 0, attempt)
        y = torch.ones(50, 50)
        assert one.strike("linear.out", 0, y)
        places.add(tuple(changed(torch.ones(50, 50), y)))
    assert len(places) == 1


def test_the_seed_and_the_place_in_the_plan_choose_the_element(tmp_path: Path) -> None:
    def place(directory: str, seed: int) -> list[int]:
        one = injector(tmp_path / directory, {}, {}, seed=seed)
        one.begin(5, 0, 0)
        y = torch.ones(100, 100)
        one.strike("linear.out", 0, y)
        return changed(torch.ones(100, 100), y)

    assert place("a", 0) == place("b", 0) != place("c", 1)
    assert len(place("d", 0)) == 2


def test_call_narrows_the_address(tmp_path: Path) -> None:
    one = injector(tmp_path, {"call": 1})
    one.begin(5, 0, 0)
    assert not one.strike("linear.out", 0, torch.ones(8), call=0)
    assert one.strike("linear.out", 0, torch.ones(8), call=1)


def test_calls_are_counted_where_the_caller_does_not(tmp_path: Path) -> None:
    one = injector(tmp_path, {"call": 1, "repeat": -1})
    for attempt in range(2):
        one.begin(5, 0, attempt)
        assert [one.strike("linear.out", 0, torch.ones(8)) for _ in range(3)] == [False, True, False]
        assert not one.strike("linear.out", 1, torch.ones(8))


def test_gradients_are_struck_whole_and_by_name(tmp_path: Path) -> None:
    by_name = {"site": "gradient", "kind": "scale", "factor": 1e4, "param": "head.weight"}
    by_place = {"site": "gradient", "kind": "zero", "layer": 1}
    one = injector(tmp_path, by_name, by_place)
    one.begin(5, 0, 0)
    gradients = {"embedding.weight": torch.ones(3, 4), "block.weight": torch.ones(3, 4), "head.weight": torch.ones(3)}
    struck = [name for i, (name, g) in enumerate(gradients.items()) if one.strike("gradient", i, g, param=name)]
    assert struck == ["block.weight", "head.weight"]
    assert gradients["head.weight"].tolist() == [1e4] * 3
    assert [(s.layer, s.kind) for s in Ledger(tmp_path, 0).strikes()] == [(1, "zero"), (2, "scale")]
    assert not gradients["block.weight"].any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_elements_are_row_major_whatever_the_strides(tmp_path: Path, device: str, dtype: torch.dtype) -> None:
    base = torch.arange(1, 25, device=device).to(dtype)
    tensors = {
        "contiguous": base.clone().reshape(4, 6),
        "transposed": base.clone().reshape(6, 4).t(),
        "sliced": base.clone().reshape(2, 12)[:, ::2],
        "scalar": base[3].clone(),
    }
    for name, tensor in tensors.items():
        index = min(7, tensor.numel() - 1)
        before = tensor.clone()
        one = injector(tmp_path / name, {"kind": "scale", "factor": -1.0, "index": index})
        one.begin(5, 0, 0)
        assert one.strike("linear.out", 0, tensor)
        assert changed(before, tensor) == [index], name


def test_the_record_states_the_change(tmp_path: Path) -> None:
    seen: list[Strike] = []
    one = injector(tmp_path, {"kind": "scale", "factor": 3.0, "index": 1}, {"kind": "zero", "index": 0})
    one.on_strike = seen.append
    one.begin(5, 0, 2)
    y = torch.tensor([0.0, 3.0, 3.0, 0.0])
    one.strike("linear.out", 0, y)
    scaled, zeroed = seen
    assert y.tolist() == [0.0, 9.0, 3.0, 0.0]
    assert scaled.relative_change == pytest.approx(6.0 / (18.0 / 4) ** 0.5)
    assert (scaled.attempt, scaled.no_effect, scaled.kind) == (2, False, "scale")
    assert (zeroed.relative_change, zeroed.no_effect) == (0.0, True)
    assert Ledger(tmp_path, 0).strikes() == seen


def test_a_change_beyond_numbers_is_infinite(tmp_path: Path) -> None:
    one = injector(tmp_path, {"kind": "nan"}, {"kind": "scale", "factor": 2.0, "index": 0, "layer": 1})
    one.begin(5, 0, 0)
    one.strike("linear.out", 0, torch.ones(4))
    one.strike("linear.out", 1, torch.tensor([float("inf"), 1.0]))
    first, second = Ledger(tmp_path, 0).strikes()
    assert first.relative_change == float("inf")
    assert (second.relative_change, second.no_effect) == (0.0, True)


def test_global_random_states_are_left_alone(tmp_path: Path) -> None:
    states = torch.get_rng_state(), random.getstate()
    one = injector(tmp_path, {})
    one.begin(5, 0, 0)
    one.strike("linear.out", 0, torch.ones(100))
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()


def test_a_tensor_that_takes_part_in_autograd_can_be_struck(tmp_path: Path) -> None:
    x = torch.ones(3, requires_grad=True)
    y = x * 2
    one = injector(tmp_path, {"index": 0})
    one.begin(5, 0, 0)
    assert one.strike("linear.out", 0, y)
    y[1:].sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0.0, 2.0, 2.0]


@pytest.mark.parametrize(
    ("fault", "tensor", "words"),
    [
        ({"kind": "bitflip", "bit": 16}, torch.ones(4, dtype=torch.bfloat16), "bit 16 does not exist"),
        ({"index": 4}, torch.ones(4), "do not fit a tensor of 4 elements"),
        ({}, torch.ones(4, dtype=torch.int32), "cannot strike a tensor of torch.int32"),
        ({}, torch.ones(1).expand(4), "share memory"),
    ],
)
def test_a_fault_that_does_not_fit_is_refused_and_not_counted(
    tmp_path: Path, fault: dict[str, Any], tensor: torch.Tensor, words: str
) -> None:
    one = injector(tmp_path, fault)
    one.begin(5, 0, 0)
    with pytest.raises(FaultPlanError, match=words):
        one.strike("linear.out", 0, tensor)
    assert Ledger(tmp_path, 0).strikes() == []


def test_empty_tensors_are_no_targets(tmp_path: Path) -> None:
    one = injector(tmp_path, {})
    one.begin(5, 0, 0)
    assert not one.strike("linear.out", 0, torch.empty(0, 3))
    assert one.armed
