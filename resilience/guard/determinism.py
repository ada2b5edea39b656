"""Measures whether this generation is bit-reproducible: one clean step is run twice more, and compared.

The verdict `deterministic` (not hardware, but data or code) rests on this measurement, so nothing is assumed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from resilience.guard.fingerprint import fingerprint

if TYPE_CHECKING:
    from resilience.guard.transaction import Guard
    from resilience.guard.verdict import Inspection

__all__ = ["measure"]


def measure(guard: Guard, run_again: Callable[[], bool]) -> tuple[bool, Inspection]:
    """Replay the recorded step twice and compare the 64-bit fingerprints of every local gradient and of the loss.

    Args:
        guard: at the boundary of a step in which nothing was seen.
        run_again: replays the step; its answer is whether outputs that are no scalars were bit-equal too.

    Returns:
        Whether the two executions were bit-equal on this rank, and what the second one showed. Its gradients are left
        in place.
    """
    first_fits, first_loss, first = _run(guard, run_again)
    second_fits, second_loss, second = _run(guard, run_again)
    equal = first.fingerprints == second.fingerprints and first_loss == second_loss
    return equal and first_fits and second_fits, second


def _run(guard: Guard, run_again: Callable[[], bool]) -> tuple[bool, int, Inspection]:
    guard.begin_attempt(0)
    fits = run_again()
    loss = guard.recorder.last_loss
    return fits, int(fingerprint(loss)) if loss is not None else 0, guard.inspect()
