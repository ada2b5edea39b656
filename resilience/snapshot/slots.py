"""Which slot of its arena a rank may overwrite next. Pure.

Kept are the newest whole snapshot, what the guardian holds, the *anchor* (the newest snapshot that is known to be
clean: a rewind goes back to it) and the *candidate* that becomes the anchor next. With one slot more than these there
is always one to write to; where holds leave none, the snapshot is skipped, by all ranks alike.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

__all__ = ["anchors", "choose"]


def choose(
    slots: Mapping[int, int | None], *, newest_whole: int | None, clean_through: int, held: Collection[int]
) -> int | None:
    """The slot to overwrite; None where every one is needed.

    Args:
        slots: step of the snapshot in each slot; None where it is empty or torn.
        newest_whole: step of the newest snapshot that is whole on every rank; None where there is none.
        clean_through: newest step that is known to be clean.
        held: steps that the guardian needs.
    """
    empty = [slot for slot, step in slots.items() if step is None]
    if empty:
        return min(empty)
    kept = {newest_whole, *held, *anchors((step for step in slots.values() if step is not None), clean_through)}
    free = [(step, slot) for slot, step in slots.items() if step is not None and step not in kept]
    return min(free)[1] if free else None


def anchors(steps: Iterable[int], clean_through: int) -> set[int]:
    """Steps of the anchor and of the candidate, where there are any."""
    have = sorted(set(steps))
    clean = [step for step in have if step <= clean_through]
    later = [step for step in have if step > clean_through]
    return {*clean[-1:], *later[:1]}
