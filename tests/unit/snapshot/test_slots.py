"""After any history there is a whole snapshot to go back to, and one that is known to be clean."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilience.snapshot.slots import anchors, choose

VERIFY_STEPS = 2


@dataclasses.dataclass
class Rank:
    """A rank that takes a snapshot wherever it can, and is cut short now and then."""

    slots: dict[int, int | None]
    newest_whole: int | None = None
    step: int = 0
    clean_through: int = 0
    held: frozenset[int] = frozenset()
    num_blocked: int = 0

    def go_on(self, num_steps: int, *, torn: bool) -> None:
        self.step += num_steps
        self.clean_through = max(self.clean_through, self.step - VERIFY_STEPS)
        slot = choose(self.slots, newest_whole=self.newest_whole, clean_through=self.clean_through, held=self.held)
        if slot is None:
            self.num_blocked += 1
            return
        self.slots[slot] = None
        # From here to the end of the copy is the worst moment to be killed.
        self.check()
        if not torn:
            self.slots[slot] = self.newest_whole = self.step

    def check(self) -> None:
        """What must be whole now: the newest snapshot, and what the guardian holds."""
        whole = {step for step in self.slots.values() if step is not None}
        if self.newest_whole is not None:
            assert self.newest_whole in whole
        assert self.held <= whole


histories = st.lists(st.tuples(st.integers(1, 6), st.booleans(), st.integers(0, 9)), min_size=1, max_size=60)


@given(histories, st.integers(3, 6))
def test_a_whole_snapshot_survives_any_history_and_so_does_the_newest_clean_one(
    history: list[tuple[int, bool, int]], num_slots: int
) -> None:
    rank, anchor = Rank(dict.fromkeys(range(num_slots))), 0
    for num_steps, torn, what in history:
        whole = sorted(step for step in rank.slots.values() if step is not None)
        # The guardian holds one of the snapshots that there are, or none.
        rank.held = frozenset(whole[what : what + 1])
        held_before = rank.held
        rank.go_on(num_steps, torn=torn)
        kept = {step for step in rank.slots.values() if step is not None}
        assert held_before <= kept
        clean = [step for step in kept if step <= rank.clean_through]
        # The anchor only ever moves forward: what was known to be clean is given up for something newer that is.
        assert max(clean, default=0) >= anchor
        anchor = max(clean, default=0)


@given(st.lists(st.tuples(st.integers(1, 6), st.booleans()), max_size=80), st.integers(0, 40))
def test_four_slots_without_holds_never_block(history: list[tuple[int, bool]], lag: int) -> None:
    slots: dict[int, int | None] = dict.fromkeys(range(4))
    newest_whole: int | None = None
    step = 0
    for num_steps, torn in history:
        step += num_steps
        slot = choose(slots, newest_whole=newest_whole, clean_through=max(0, step - lag), held=())
        assert slot is not None
        slots[slot] = None
        if not torn:
            slots[slot] = newest_whole = step


def test_empty_and_torn_slots_come_first() -> None:
    assert choose({0: 7, 1: None, 2: None}, newest_whole=7, clean_through=9, held=()) == 1


def test_of_those_that_nobody_needs_the_oldest_goes() -> None:
    slots: dict[int, int | None] = {0: 4, 1: 3, 2: 9, 3: 5}
    # 5 is the anchor, 9 the newest and the candidate.
    assert choose(slots, newest_whole=9, clean_through=6, held=()) == 1


def test_where_everything_is_needed_there_is_none() -> None:
    slots: dict[int, int | None] = {0: 4, 1: 6, 2: 9}
    assert choose(slots, newest_whole=9, clean_through=5, held=()) is None
    assert choose({0: 4, 1: 9, 2: 10}, newest_whole=10, clean_through=9, held={4}) is None


@pytest.mark.parametrize(
    ("steps", "clean_through", "expected"),
    [([], 5, set()), ([3, 4], 5, {4}), ([7, 8], 5, {7}), ([3, 5, 7, 8], 5, {5, 7}), ([2], 0, {2})],
)
def test_anchors(steps: list[int], clean_through: int, expected: set[int]) -> None:
    assert anchors(steps, clean_through) == expected
