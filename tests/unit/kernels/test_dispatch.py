"""Where Triton's kernels take the place of torch's arithmetic, and where they cannot."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from resilience import kernels


class OnCuda:
    """What the choice looks at of a tensor."""

    is_cuda = True
    device = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """What is known of this machine is found out anew, before and after."""
    caches = kernels._loaded, kernels._can_launch
    for cache in caches:
        cache.cache_clear()
    yield
    kernels._given_up.clear()
    for cache in caches:
        cache.cache_clear()


def test_a_tensor_on_the_cpu_never_gets_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_can_launch", lambda: True)
    assert kernels.triton_kernels("hash.kernel", torch.ones(1)) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_triton_that_cannot_launch_is_told_once_and_replaced(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("triton", reason="triton has builds for Linux only")
    tensor: Any = OnCuda()
    with caplog.at_level(logging.WARNING):
        for module in ("hash.kernel", "checksum.sweep"):
            assert kernels.triton_kernels(module, tensor) is None
    (message,) = caplog.messages
    assert "Triton cannot launch" in message


def test_without_triton_torch_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    tensor: Any = OnCuda()
    assert kernels.triton_kernels("hash.kernel", tensor) is None


@pytest.mark.parametrize(("capability", "is_there"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_devices_from_ampere_on_are_served(
    capability: tuple[int, int], is_there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton", reason="triton has builds for Linux only")
    monkeypatch.setattr(kernels, "_can_launch", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    tensor: Any = OnCuda()
    module = kernels.triton_kernels("hash.kernel", tensor)
    assert (module is not None) == is_there


@pytest.mark.parametrize("error", [OSError("the cache is full"), "OutOfResources"])
def test_a_kernel_that_a_device_cannot_have_is_replaced_and_not_tried_again(
    error: OSError | str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    errors = pytest.importorskip("triton.runtime.errors")
    raised = errors.OutOfResources(300000, 232448, "shared memory") if isinstance(error, str) else error
    monkeypatch.setattr(kernels, "triton_kernels", lambda module, tensor: kernels)
    num_tried = 0

    def run(module: object) -> int:
        nonlocal num_tried
        num_tried += 1
        raise raised

    tensor: Any = OnCuda()
    with caplog.at_level(logging.WARNING):
        assert kernels.launch("checksum.sweep", tensor, run) is None
        assert kernels.launch("checksum.sweep", tensor, run) is None
    assert num_tried == 1
    assert "checksum.sweep cannot run on device 0" in caplog.text
    assert kernels.launch("hash.kernel", tensor, lambda module: 7) == 7


@pytest.mark.parametrize("who", ["CUDA error", "Triton Error [CUDA]"])
@pytest.mark.parametrize("what", ["an illegal memory access was encountered", "out of memory"])
def test_what_is_no_fault_of_a_kernel_s_compilation_is_not_hidden(
    who: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory that is short now, a device that broke."""
    monkeypatch.setattr(kernels, "triton_kernels", lambda module, tensor: kernels)

    def run(module: object) -> None:
        raise RuntimeError(f"{who}: {what}")

    tensor: Any = OnCuda()
    with pytest.raises(RuntimeError, match=what):
        kernels.launch("checksum.sweep", tensor, run)
    assert kernels.launch("checksum.sweep", tensor, lambda module: 7) == 7


@pytest.mark.parametrize("words", ["PassManager::run failed", "Triton Error [CUDA]: device kernel image is invalid"])
def test_a_failure_of_triton_s_that_has_no_class_is_known_by_its_words(
    words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "triton_kernels", lambda module, tensor: kernels)

    def run(module: object) -> None:
        raise RuntimeError(words)

    tensor: Any = OnCuda()
    assert kernels.launch("hash.kernel", tensor, run) is None
    assert kernels.launch("hash.kernel", tensor, lambda module: 7) is None, "it is not tried again"


def test_a_machine_without_the_driver_s_library_is_served_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = pytest.importorskip("triton.runtime", reason="triton has builds for Linux only")

    class Driver:
        @property
        def active(self) -> object:
            raise AssertionError("libcuda.so cannot found!")

    monkeypatch.setattr(runtime, "driver", Driver())
    tensor: Any = OnCuda()
    assert kernels.triton_kernels("hash.kernel", tensor) is None
