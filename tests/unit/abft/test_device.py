"""On a CUDA device a handler runs with its tensors' device as the current one, and not for what becomes a graph."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from resilience.abft.device import on_device


class Machine:
    """Two devices, as `torch.cuda` shows them."""

    def __init__(self) -> None:
        self.current = 0
        self.is_capturing = False

    @contextlib.contextmanager
    def device(self, index: int) -> Iterator[None]:
        before, self.current = self.current, index
        try:
            yield
        finally:
            self.current = before


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine()
    monkeypatch.setattr("torch.cuda.current_device", lambda: machine.current)
    monkeypatch.setattr("torch.cuda.device", machine.device)
    monkeypatch.setattr("torch.cuda.is_current_stream_capturing", lambda: machine.is_capturing)
    return machine


def on_cuda(index: int) -> torch.Tensor:
    with FakeTensorMode():
        return torch.empty(2, device=f"cuda:{index}")


@pytest.mark.parametrize(
    ("args", "kwargs", "expected"),
    [
        ((on_cuda(0), on_cuda(0)), {}, 0),
        ((torch.ones(1), on_cuda(1)), {}, 1),
        ((2.0,), {"out": on_cuda(1)}, 1),
        ((None,), {}, 0),
    ],
)
def test_the_device_of_the_tensors_is_current(
    machine: Machine, args: tuple[Any, ...], kwargs: dict[str, Any], expected: int
) -> None:
    def handler(original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return machine.current, original(*args, **kwargs)

    passed_over: list[str] = []
    handle = on_device(handler, passed_over.append)
    assert handle(lambda *args, **kwargs: "result", args, kwargs) == (expected, "result")
    assert machine.current == 0
    assert passed_over == []


def test_what_a_graph_captures_is_passed_over_and_named(machine: Machine) -> None:
    machine.is_capturing = True
    passed_over: list[str] = []
    handle = on_device(lambda *_: pytest.fail("a captured check would never be read"), passed_over.append)
    assert handle(lambda one: one + 1, (1,), {}) == 2
    assert passed_over == ["captured into a CUDA graph"]


@pytest.mark.parametrize("device_index", [0, 1])
def test_what_inductor_runs_before_it_captures_is_passed_over(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, device_index: int
) -> None:
    """It lies in the graph's memory: of that a check may keep nothing. What runs beside on other streams is checked."""
    streams = {0: "script's", 1: "script's"}
    managers = {0: None, 1: SimpleNamespace(stream="inductor's")}
    asked: list[bool] = []

    def get_manager(index: int, create_if_none_exists: bool = True) -> SimpleNamespace | None:
        asked.append(create_if_none_exists)
        return managers[index]

    monkeypatch.setitem(sys.modules, "torch._inductor.cudagraph_trees", SimpleNamespace(get_manager=get_manager))
    monkeypatch.setattr("torch.cuda.current_stream", streams.__getitem__)
    passed_over: list[str] = []
    handle = on_device(lambda *_: "checked", passed_over.append)
    call = (lambda one: "run", (on_cuda(device_index),), {})
    assert handle(*call) == "checked"
    streams[1] = "inductor's"
    assert handle(*call) == ("run" if device_index == 1 else "checked")
    assert passed_over == ["captured into a CUDA graph"] * device_index
    assert not any(asked), "a manager is inductor's to make"


def test_inductor_has_what_is_asked_of_it() -> None:
    trees = pytest.importorskip("torch._inductor.cudagraph_trees")
    assert trees.get_manager(0, create_if_none_exists=False) is None
