"""The sum of squares of the weight gradient that was checked last: the screen of gradients need not read it again.

A gradient arrives at its parameter's hook right after the product that made it: the next one that is checked takes its
place here. No references are held to it: autograd copies a gradient that somebody else has, too.
"""

from __future__ import annotations

import math
import weakref

import torch

__all__ = ["LastGradient"]


class LastGradient:
    """Of one process; written by the check, read in the hook."""

    def __init__(self) -> None:
        self._of: weakref.ref[torch.Tensor] | None = None
        self._version = 0
        self._squares = math.nan

    def keep(self, gradient: torch.Tensor, squares: float) -> None:
        """`gradient` has passed its check, whose sums were those of its elements as they are now."""
        self._of, self._version, self._squares = weakref.ref(gradient), gradient._version, squares

    def squares_of(self, gradient: torch.Tensor) -> float | None:
        """Sum of squares of `gradient`, if it is the one that was kept, or its transpose, and nobody has written to it.

        None also where squares are beyond the range of the arithmetic.
        """
        kept = None if self._of is None else self._of()
        if kept is None or type(gradient) is not torch.Tensor or gradient.layout is not torch.strided:
            return None
        if gradient.data_ptr() != kept.data_ptr() or gradient._version != self._version:
            return None
        place, straight = (gradient.shape, gradient.stride()), (kept.shape, kept.stride())
        turned = tuple(reversed(kept.shape)), tuple(reversed(kept.stride()))
        return self._squares if place in (straight, turned) and math.isfinite(self._squares) else None
