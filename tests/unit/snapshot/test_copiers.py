"""What is copied late is what it was, or the copy is refused; what may change is copied before it can."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from resilience.snapshot.copiers import Bytes, StreamCopier, WaitingCopier, copier_for
from tests.integration.workers.late_streams import LateStreams


class Slot:
    """Two storages, a weight and a buffer, and the memory they are copied to."""

    def __init__(self, refuses: str = "") -> None:
        self.streams = LateStreams(refuses)
        self.copier = StreamCopier(self.streams)
        self.weight, self.buffer = torch.full((100,), 1.0), torch.full((7,), 1.0)
        self.memory: Bytes = np.zeros(4096, np.uint8)
        self.copier.admit(self.memory)

    def begin(self) -> None:
        self.copier.begin(lambda: frozenset({self.weight.untyped_storage()._cdata}))
        self.copier.copy(self.memory[64:464], self.weight.view(torch.uint8))
        self.copier.copy(self.memory[512:540], self.buffer.view(torch.uint8))
        self.copier.seal()

    def copied(self) -> tuple[set[float], set[float]]:
        weight, buffer = self.memory[64:464].view(np.float32), self.memory[512:540].view(np.float32)
        return set(weight.tolist()), set(buffer.tolist())


@pytest.fixture
def slot() -> Slot:
    return Slot()


def test_what_a_forward_may_change_is_copied_before_it_and_the_rest_later(slot: Slot) -> None:
    slot.begin()
    assert slot.copied() == ({0.0}, {1.0})
    slot.buffer.fill_(2.0)
    slot.copier.go_on()
    assert slot.copied() == ({0.0}, {1.0}), "a copy beside the forward has not run yet"
    assert slot.copier.is_copying
    assert slot.copier.finish()
    assert slot.copied() == ({1.0}, {1.0})
    assert not slot.copier.is_copying


def test_the_copy_is_started_once_and_waited_for_once(slot: Slot) -> None:
    slot.begin()
    for _ in range(3):
        slot.copier.go_on()
    slot.streams.run()
    slot.copier.go_on()
    # What may change, the copy, and two looks at what is being copied; none when it is done.
    assert slot.streams.log == ["beside", "hold", "beside", "beside", "beside"]
    assert slot.copier.is_done
    assert slot.copier.finish()
    assert slot.copier.finish(), "nothing is left to copy"
    assert slot.streams.log[5:] == []


def test_without_a_forward_the_copy_is_made_when_it_is_waited_for(slot: Slot) -> None:
    slot.begin()
    assert slot.copier.finish()
    assert slot.copied() == ({1.0}, {1.0})


@pytest.mark.parametrize("when", ["before the forward", "beside it"])
def test_a_state_that_changed_is_refused(slot: Slot, when: str) -> None:
    slot.begin()
    if when == "before the forward":
        slot.weight[99] = 2.0
    slot.copier.go_on()
    if when == "beside it":
        slot.weight.view(torch.int32)[0] ^= 1
    assert not slot.copier.finish()
    assert not slot.copier.is_copying
    slot.begin()
    assert slot.copier.finish(), "the next one is another matter"


@pytest.mark.parametrize("second", [True, False])
def test_a_state_that_was_away_and_came_back_is_refused(slot: Slot, second: bool) -> None:
    """Weights are swapped for averaged ones, a forward runs, they are swapped back."""
    slot.begin()
    if second:
        slot.copier.go_on()
    before = slot.weight.clone()
    slot.weight.fill_(7.0)
    slot.copier.go_on()
    slot.streams.run()
    slot.weight.copy_(before)
    assert not slot.copier.finish()


def test_a_copy_that_was_done_before_the_state_changed_and_came_back_holds(slot: Slot) -> None:
    slot.begin()
    slot.copier.go_on()
    slot.streams.run()
    before = slot.weight.clone()
    slot.weight.fill_(7.0)
    slot.copier.go_on()
    slot.weight.copy_(before)
    assert slot.copier.finish()
    assert slot.copied() == ({1.0}, {1.0})


def test_memory_that_cannot_be_page_locked_is_copied_to_at_once(slot: Slot) -> None:
    slot = Slot(refuses="cudaHostRegister: out of memory")
    slot.begin()
    assert slot.copied() == ({1.0}, {1.0})
    assert not slot.copier.is_copying
    assert slot.copier.problem == "memory of snapshots cannot be page-locked (cudaHostRegister: out of memory)"
    slot.copier.release(slot.memory)


def test_waiting_from_now_on(slot: Slot) -> None:
    slot.copier.wait_from_now_on("for a reason")
    slot.begin()
    assert slot.copied() == ({1.0}, {1.0})
    assert not slot.copier.is_copying
    assert slot.copier.problem == "for a reason"
    assert slot.copier.finish()


def test_storages_live_until_they_are_copied_and_no_longer(slot: Slot) -> None:
    slot.begin()
    slot.copier.go_on()
    storage = StorageWeakRef(slot.weight.untyped_storage())
    slot.weight = torch.zeros(100)
    assert not storage.expired(), "nobody else may be given this memory yet"
    assert slot.copier.finish()
    assert slot.copied() == ({1.0}, {1.0})
    assert storage.expired()


def test_what_is_dropped_is_written_no_more(slot: Slot) -> None:
    slot.begin()
    slot.copier.go_on()
    slot.copier.drop()
    held = slot.memory.copy()
    slot.weight.fill_(9.0)
    slot.streams.run()
    assert np.array_equal(slot.memory, held)
    assert not slot.copier.is_copying


def test_memory_is_unlocked_once(slot: Slot) -> None:
    assert slot.streams.locked == {slot.memory.ctypes.data}
    slot.copier.release(slot.memory)
    slot.copier.release(slot.memory)
    assert slot.streams.locked == set()


def test_on_the_cpu_nothing_is_late() -> None:
    copier = copier_for(torch.device("cpu"))
    assert isinstance(copier, WaitingCopier)
    assert not copier.serves(torch.zeros(3)), "the caller copies what lies in memory"
    assert copier.finish()
