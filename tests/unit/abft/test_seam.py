"""Overrides: installed, gated by thread, removed without a trace."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from resilience.abft.seam import Gate, Original, Seam


class Counter:
    """A handler that counts and passes through."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, original: Original, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.calls += 1
        # What a handler calls is not protected again.
        torch.mm(torch.ones(2, 2), torch.ones(2, 2))
        return original(*args, **kwargs)


def seam_with(counter: Counter) -> tuple[Gate, Seam]:
    gate = Gate()
    seam = Seam(gate)
    seam.add("mm", counter)
    return gate, seam


def test_only_gated_calls_reach_the_handler() -> None:
    counter = Counter()
    gate, seam = seam_with(counter)
    a = torch.randn(3, 3)
    expected = a @ a
    seam.install()
    try:
        assert torch.equal(a @ a, expected)
        assert counter.calls == 0
        with gate.opened():
            assert torch.equal(a @ a, expected)
            with gate.opened():
                a @ a
            a @ a
        assert counter.calls == 3
    finally:
        seam.uninstall()
    with gate.opened():
        a @ a
    assert counter.calls == 3


def test_install_and_uninstall_may_be_repeated() -> None:
    counter = Counter()
    gate, seam = seam_with(counter)
    for _ in range(2):
        seam.install()
        seam.install()
        with gate.opened():
            torch.mm(torch.ones(2, 2), torch.ones(2, 2))
        seam.uninstall()
        seam.uninstall()
    assert counter.calls == 2


def test_another_thread_is_not_protected() -> None:
    counter = Counter()
    gate, seam = seam_with(counter)
    seam.install()
    try:
        with gate.opened():
            thread = threading.Thread(target=lambda: torch.mm(torch.ones(2, 2), torch.ones(2, 2)))
            thread.start()
            thread.join()
        assert counter.calls == 0
    finally:
        seam.uninstall()


def test_the_gate_is_as_before_when_the_handler_raises() -> None:
    gate = Gate()

    def fail(original: Original, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        raise ValueError("broken handler")

    seam = Seam(gate)
    seam.add("mm", fail)
    seam.install()
    try:
        with gate.opened():
            with pytest.raises(ValueError, match="broken handler"):
                torch.mm(torch.ones(2, 2), torch.ones(2, 2))
            assert gate.is_open("CPU")
        assert not gate.is_open("CPU")
    finally:
        seam.uninstall()


def test_a_gate_is_shut_in_the_middle_of_gated_work_and_of_an_admitted_pass() -> None:
    counter = Counter()
    gate, seam = seam_with(counter)
    weight = torch.randn(3, 3, requires_grad=True)

    def in_between(_: torch.Tensor) -> None:
        gate.admit(torch._C._current_graph_task_id())
        with gate.shut():
            torch.mm(torch.ones(2, 2), torch.ones(2, 2))

    seam.install()
    try:
        with gate.opened():
            with gate.shut():
                torch.mm(torch.ones(2, 2), torch.ones(2, 2))
            assert counter.calls == 0
            assert gate.is_open("CPU")
        out = (torch.randn(3, 3) @ weight).sum()
        out.register_hook(in_between)
        out.backward()
        assert counter.calls == 1, "the product of the pass itself"
    finally:
        seam.uninstall()


def test_operators_without_a_kernel_at_a_key_are_left_out() -> None:
    seam = Seam(Gate())
    seam.add("_scaled_dot_product_cudnn_attention", Counter())
    assert ("_scaled_dot_product_cudnn_attention", "CPU") not in seam.operators


def test_an_admitted_backward_pass_is_let_through_and_no_other() -> None:
    counter = Counter()
    gate, seam = seam_with(counter)
    weight = torch.randn(3, 3, requires_grad=True)

    def loss(admit: bool) -> torch.Tensor:
        out = (torch.randn(3, 3) @ weight).sum()
        if admit:
            out.register_hook(lambda _: gate.admit(torch._C._current_graph_task_id()))
        return out

    seam.install()
    try:
        for admit in (False, True, False):
            before = counter.calls
            loss(admit).backward()
            assert counter.calls == before + admit
        torch.mm(weight.detach(), weight.detach())
        assert counter.calls == 1
    finally:
        seam.uninstall()


@pytest.mark.parametrize("key", ["CUDA", "SparseCUDA", "SparseCsrCUDA", "CPU"])
def test_the_backward_thread_of_a_device_counts_as_the_one_that_opened(key: str) -> None:
    gate = Gate()
    is_open, is_done = threading.Event(), threading.Event()
    seen: list[bool] = []

    def open_it() -> None:
        with gate.opened():
            is_open.set()
            is_done.wait(60.0)

    out = torch.ones(2, requires_grad=True).sum()
    out.register_hook(lambda _: seen.append(gate.is_open(key)))
    opener = threading.Thread(target=open_it)
    opener.start()
    try:
        assert is_open.wait(60.0)
        assert not gate.is_open(key), "a thread without a backward pass"
        out.backward()
    finally:
        is_done.set()
        opener.join()
    assert seen == [key != "CPU"]
