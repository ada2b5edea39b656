"""Which operations of a step are checked, by the numbers of their autograd nodes: what belongs together is checked
together. No checks; how often is `adaptive`'s to say.
"""

from __future__ import annotations

__all__ = ["Decisions"]

_MAX_NODES = 65_536
"""Where nobody ever begins a step anew, all are forgotten beyond that many."""


class Decisions:
    """Of the operations since the step, or its replay, began."""

    def __init__(self) -> None:
        self._made: dict[int, bool | None] = {}

    def clear(self) -> None:
        """Forget all of them."""
        self._made.clear()

    def made(self, node: int, is_due: bool) -> None:
        """The operation under `node` is checked, or is not. Of several none speaks for the others, though they
        may agree: they mostly agree on not being checked, and what follows would be checked all the less.
        """
        if len(self._made) >= _MAX_NODES:
            self._made.clear()
        self._made[node] = None if node in self._made else is_due

    def of(self, node: int) -> bool | None:
        """What was decided under `node`; None where that is not known, or several operations were."""
        return self._made.get(node)
